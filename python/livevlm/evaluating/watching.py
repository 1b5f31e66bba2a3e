# SPDX-License-Identifier: Apache-2.0
"""One stream, watched as it comes: clips, and questions at their moments."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from livevlm.checkpoint import Checkpoint
from livevlm.config import Config
from livevlm.errors import StateError
from livevlm.stream import Stream
from livevlm.synthetic import Question

Embeddings = dict[tuple[int, int], Tensor]
"""What the vision tower makes of a clip, by its first frame and the one behind its last."""


def watch(
    checkpoint: Checkpoint,
    config: Config,
    frames: Tensor,
    questions: Sequence[Question],
    embeddings: Embeddings | None = None,
) -> dict[str, Any]:
    """Reads all frames, asks each question when so many frames have been seen as it says.

    Args:
        embeddings: of the clips; what is not there is added. No memory changes them, so that many can share them.

    Returns:
        answers: kind, frames seen, frame of the evidence or None, and whether right (1 or 0), for each question.
        tokens, most_tokens: of video in a layer, at the end and at most.
        seen: tokens of the stream.
        bytes: of keys and values at the end.
        read_seconds, answer_seconds: all together; the vision tower's time is left out.

    Raises:
        StateError: the memory exceeded its budget after a clip.
    """
    stream, waiting = Stream(checkpoint.model, checkpoint.processor, config), list(questions)
    bounded, answers, most = not stream.cache.policy.unbounded, [], 0
    read_seconds = answer_seconds = 0.0
    moments = sorted({question.frame for question in questions} | {len(frames)})
    vision = _Vision(stream, {} if embeddings is None else embeddings)
    start = 0
    while start < len(frames):
        stop = min(start + config.clip_frames, next(moment for moment in moments if moment > start))
        vision.clip = start, stop
        began = _now(frames)
        stream.push(frames[start:stop])
        read_seconds += _now(frames) - began
        held, start = stream.cache.memory.num_video_tokens, stop
        most = max(most, held)
        if bounded and held > stream.cache.budget:
            raise StateError(f"{held} tokens after {stop} frames exceed the budget of {stream.cache.budget}")
        while waiting and waiting[0].frame == stop:
            question = waiting.pop(0)
            answer = stream.ask(question.text, num_evidence=0, max_new_tokens=2)
            answer_seconds += answer.seconds
            right = int(answer == question.answer)
            answers.append([question.kind, question.frame, question.evidence_frame, right])
    stats = stream.stats()
    return {
        "tokens": stats.num_video_tokens,
        "most_tokens": most,
        "seen": stats.num_seen_tokens,
        "bytes": stats.kv_bytes,
        "read_seconds": round(read_seconds - vision.seconds, 5),
        "answer_seconds": round(answer_seconds, 5),
        "answers": answers,
    }


class _Vision:
    """Stands for a stream's vision tower, and remembers what that said of each clip."""

    def __init__(self, stream: Stream, embeddings: Embeddings) -> None:
        adapter = stream.cache.adapter
        self.embeddings, self.clip, self.seconds = embeddings, (0, 0), 0.0
        # No cycle: a stream that was watched lets go of its memory.
        self._embed, self._adapter = type(adapter).embed_frames, weakref.proxy(adapter)
        adapter.embed_frames = self  # type: ignore[method-assign]

    def __call__(self, pixel_values: Tensor) -> Tensor:
        began = _now(pixel_values)
        if self.clip not in self.embeddings:
            self.embeddings[self.clip] = self._embed(self._adapter, pixel_values)
        self.seconds += _now(pixel_values) - began
        return self.embeddings[self.clip]


def _now(frames: Tensor) -> float:
    if frames.is_cuda:
        torch.cuda.synchronize(frames.device)
    return time.perf_counter()
