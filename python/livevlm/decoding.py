# SPDX-License-Identifier: Apache-2.0
"""The answer to a question, token by token: by replaying captured passes, or through the stock model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from livevlm.attention import Turn
from livevlm.buffers import BUCKETS
from livevlm.evidence import FIRST_LAYER, last_look
from livevlm.options import Decoding, Sampler
from livevlm.replay import Kind

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

NUM_IN_FLIGHT = 4  # ids that may be on their way to the host; two are


@dataclass(frozen=True)
class Question:
    """Token ids, on the host: all that follows the newline that ends the video; and the question's text alone, which
    is read first if it takes two passes (see `needs_two_passes`)."""

    token_ids: Tensor
    text_ids: Tensor | None

    @property
    def num_tokens(self) -> int:
        return 1 + self.token_ids.shape[0]


def answer_tokens(
    cache: LiveCache, turn: Turn, question: Question, options: Decoding, stop: Collection[int]
) -> Iterator[int]:
    """Token ids of the answer, one by one, up to a stop token. The turn then holds what its evidence follows from."""
    cache.require_same_model()
    sampler = Sampler(options, cache.memory.shape.device)
    answer = _way(cache, question, options.max_new_tokens)
    return answer(cache, turn, question, sampler, options.max_new_tokens, stop)


def _way(cache: LiveCache, question: Question, max_new_tokens: int) -> Callable[..., Iterator[int]]:
    kinds: list[Kind] = [(question.num_tokens, retrieves_inline(cache))]
    if question.text_ids is not None:
        kinds.append((question.text_ids.shape[0], True))
    return _replayed if cache.replay.can_answer(kinds, max_new_tokens) else _eager


def needs_two_passes(cache: LiveCache) -> bool:
    return cache.config.retrieval_pass == "two_pass" and cache.retrieval.is_needed(cache.memory)


def retrieves_inline(cache: LiveCache) -> bool:
    return cache.config.retrieval != "none" and cache.config.retrieval_pass == "inline"


def warm_up(cache: LiveCache, max_new_tokens: int) -> None:
    kinds = [retrieves_inline(cache)]
    if cache.config.retrieval != "none" and cache.config.retrieval_pass == "two_pass":
        kinds.append(True)
    cache.replay.warmup(kinds, max_new_tokens)


# -------------------------------------------------------------------- through the stock model
@torch.no_grad()
def next_logits(cache: LiveCache, embeds: Tensor) -> Tensor:
    """Reads embeddings `[num_tokens, hidden]` of question or answer; logits `[1, vocab_size]` of what follows."""
    output = cache.adapter.language_model(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    return cache.adapter.logits(output.last_hidden_state[:, -1])


@torch.no_grad()
def choose_blocks(cache: LiveCache, embeds: Tensor) -> None:
    """Two-pass retrieval: reads `[num_tokens, hidden]`, keeps the blocks that each layer chose, forgets the rest."""
    if not needs_two_passes(cache):
        return
    start = cache.memory.end
    cache.adapter.language_model(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    cache.memory.end = start


def _eager(
    cache: LiveCache,
    turn: Turn,
    question: Question,
    sampler: Sampler,
    max_new_tokens: int,
    stop: Collection[int],
) -> Iterator[int]:
    with torch.no_grad():
        embeds = cache.adapter.embed_question(question.token_ids)
        text = None if question.text_ids is None else cache.adapter.embed_tokens(question.text_ids)
    if text is not None:
        want_mass, turn.want_mass = turn.want_mass, False
        choose_blocks(cache, text)
        turn.want_mass = want_mass
    logits = next_logits(cache, embeds)
    turn.want_mass = False  # the first token's look-up is the evidence
    for count in range(1, max_new_tokens + 1):
        with torch.no_grad():
            token = sampler(logits)
        token_id = int(token)
        if token_id in stop:
            return
        yield token_id
        if count < max_new_tokens:
            with torch.no_grad():
                embeds = cache.adapter.embed_tokens(token)
            logits = next_logits(cache, embeds)


# -------------------------------------------------------------------- by captured passes
def _replayed(
    cache: LiveCache,
    turn: Turn,
    question: Question,
    sampler: Sampler,
    max_new_tokens: int,
    stop: Collection[int],
) -> Iterator[int]:
    """The next token is computed while the newest one is on its way to the host; one too many is forgotten."""
    replay, memory, want_mass = cache.replay, cache.memory, turn.want_mass
    buffers, start, position = replay.buffers, memory.end, cache.next_position
    assert buffers is not None
    turn.want_mass = False
    if cache.retrieval.is_needed(memory):
        cache.retrieval.summaries(memory)
    memory.open(BUCKETS[-1] + max_new_tokens)
    same = True
    if question.text_ids is not None:
        same = replay.read_question(question.text_ids, start, position, after_video=False, retrieve=True)
    elif cache.config.retrieval_pass == "two_pass":
        buffers.read_everything()
    inline = retrieves_inline(cache)
    if not (same and replay.read_question(question.token_ids, start, position, after_video=True, retrieve=inline)):
        memory.end, turn.want_mass = start, want_mass  # the model is not what it was: from the beginning
        yield from _way(cache, question, max_new_tokens)(cache, turn, question, sampler, max_new_tokens, stop)
        return
    end = start + question.num_tokens
    memory.place_text(slice(end, memory.end), position + question.num_tokens)
    to_host = _ToHost(memory.shape.device)
    for count in range(1, max_new_tokens + 1):
        with torch.no_grad():
            token = sampler(buffers.logits)
        buffers.token.copy_(token)
        to_host.send(token)
        # Not ahead of the first token: launching hundreds of kernels behind a whole question waits for most of it.
        if 1 < count < max_new_tokens:
            replay.read_token()
        token_id = to_host.receive()
        if token_id in stop:
            break
        yield token_id
        if 1 == count < max_new_tokens:
            replay.read_token()
    if want_mass and memory.shape.num_layers > FIRST_LAYER:
        turn.looks = last_look(cache, buffers, end)


class _ToHost:
    """Token ids on their way from the device, first in, first out."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._ids = torch.zeros(NUM_IN_FLIGHT, dtype=torch.int64, pin_memory=cuda)
        self._events = [torch.cuda.Event() for _ in range(NUM_IN_FLIGHT)] if cuda else None
        self._sent = self._received = 0

    def send(self, token: Tensor) -> None:
        at = self._sent % NUM_IN_FLIGHT
        self._ids[at : at + 1].copy_(token, non_blocking=True)
        if self._events is not None:
            self._events[at].record(torch.cuda.current_stream(token.device))
        self._sent += 1

    def receive(self) -> int:
        at = self._received % NUM_IN_FLIGHT
        if self._events is not None:
            self._events[at].synchronize()
        self._received += 1
        return int(self._ids[at])
