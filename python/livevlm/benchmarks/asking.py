# SPDX-License-Identifier: Apache-2.0
"""Puts one question to a stream and says how it went."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from livevlm.answer import Answer
from livevlm.benchmarks import scoring
from livevlm.benchmarks.prompts import OUTPUT, POLL, Prompts, written
from livevlm.benchmarks.schema import Query
from livevlm.benchmarks.scoring import Official
from livevlm.processing import Processor
from livevlm.stream import Stream

NUM_EVIDENCE = 3  # frames, for questions whose evidence is known


@dataclass
class AskedProcessor(Processor):
    """A processor for one question.

    Attributes:
        prefix: how the answer begins, behind the chat template's own words.
        about: the question's text, which is all that a retrieval pass of its own sees (`retrieval_pass`): no options.
    """

    prefix: str = ""
    about: str = ""

    def prompt(self, question: str) -> tuple[Tensor, Tensor]:
        before, after = super().prompt(question)
        return before, torch.cat((after, self._ids(self.prefix))) if self.prefix else after

    def text(self, question: str) -> Tensor:
        return super().text(self.about)


@dataclass(frozen=True)
class Asker:
    prompts: Prompts
    max_new_tokens: Mapping[str, int]
    choice: Official

    def ask(self, stream: Stream, query: Query) -> dict[str, Any]:
        """All kinds but "proactive": the reply, whether it is right, and how long it took."""
        form = self.prompts.of(query)
        prompt, prefix = written(query, form), form.prefix if query.kind == "choice" else ""
        answer = self._put(stream, query, prompt, prefix)
        return {
            "prompt": prompt,
            "prefix": prefix,
            "reply": str(answer),
            "strict": scoring.is_right(answer, query),
            "official": scoring.official(answer, query, self.choice),
            **told(answer),
        }

    def poll(self, stream: Stream, query: Query) -> dict[str, Any]:
        """Whether a "proactive" question's moment has come: any "yes" in the reply says so, as in the benchmark."""
        prompt = POLL.replace("{output}", query.answer).replace("{question}", query.text)
        answer = self._put(stream, query, prompt, "")
        return {"prompt": prompt, "poll_reply": str(answer), "comes": "yes" in answer.lower(), **told(answer)}

    def output(self, stream: Stream, query: Query) -> dict[str, Any]:
        """What a "proactive" question wanted to be told."""
        prompt = OUTPUT.replace("{question}", query.text)
        answer = self._put(stream, query, prompt, "")
        return {"prompt": prompt, "reply": str(answer), **told(answer)}

    def _put(self, stream: Stream, query: Query, prompt: str, prefix: str) -> Answer:
        plain = stream.processor
        values = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Processor)}
        stream.processor = AskedProcessor(**values, prefix=prefix, about=query.text)
        try:
            return stream.ask(
                prompt,
                max_new_tokens=self.max_new_tokens[query.kind],
                num_evidence=NUM_EVIDENCE if query.windows else 0,
            )
        finally:
            stream.processor = plain


def told(answer: Answer) -> dict[str, Any]:
    """Times of an answer, and its evidence if it was asked for."""
    rest = answer.num_tokens - 1
    return {
        "ttft_ms": round(1e3 * answer.ttft, 3),
        "ms_per_token": round(1e3 * (answer.seconds - answer.ttft) / rest, 3) if rest > 0 else None,
        "num_new_tokens": answer.num_tokens,
        "evidence": [item.time for item in answer.evidence],
    }


def standing(stream: Stream) -> dict[str, Any]:
    """What the stream had seen and held when it was asked."""
    stats = stream.stats()
    return {
        "seen_seconds": stats.seconds,
        "num_frames": stats.num_frames,
        "num_video_tokens": stats.num_video_tokens,
        "num_seen_tokens": stats.num_seen_tokens,
        "kv_bytes": stats.kv_bytes,
        "allocated_bytes": stats.allocated_bytes,
        "graphs": stats.graphs,
    }
