# SPDX-License-Identifier: Apache-2.0
"""What a question attends to: blocks chosen per layer, in time order, at the positions the config says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import livevlm.retrieval
from livevlm import Config, LiveCache
from livevlm.attention import Read
from livevlm.retrieval import Retrieval
from streams import PROMPT, QUESTION, pixels, times, tiny_random


def filled(**settings: object) -> LiveCache:
    cache = LiveCache(tiny_random(), Config(**{"policy": "full", "block_size": 8, **settings}))
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(40), times(40))
    return cache


def slots_of(cache: LiveCache, blocks: torch.Tensor) -> torch.Tensor:
    """Slots of retrieved blocks."""
    size = cache.retrieval.block_size
    return (cache.memory.video_start + blocks.long()[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def ask(cache: LiveCache) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    embeds = cache.adapter.embed_question(QUESTION)[None]
    with cache.question() as turn:
        out = cache.adapter.language_model(inputs_embeds=embeds, past_key_values=cache)
        return out.last_hidden_state, {layer: slots_of(cache, blocks) for layer, blocks in turn.blocks.items()}


def test_how_many() -> None:
    cache = filled(retrieval="mean_key", retrieval_ratio=0.4, recent_frames=3)
    blocks = (160 - 3 * 4) // 8
    assert cache.retrieval.num_candidates(cache.memory) == blocks == 18
    assert cache.retrieval.num_selected(cache.memory) == 8  # ceil(0.4 * 18)
    _, slots = ask(cache)
    assert sorted(slots) == [0, 1, 2]
    for chosen in slots.values():
        assert chosen.numel() == 8 * 8
        assert (chosen.diff() > 0).all(), "in time order, none twice"
        starts = chosen.view(-1, 8)[:, 0] - cache.memory.video_start
        assert (starts % 8 == 0).all() and starts.max() < blocks * 8


def test_frame_retrieval_follows_rekv() -> None:
    """Mean un-rotated key of each frame, dot product with the mean query over all heads, best frames per layer."""
    cache = filled(retrieval="frame", num_retrieved_frames=5, recent_frames=2)
    memory = cache.memory
    q = torch.randn(6, 14, 16, generator=torch.Generator().manual_seed(4))
    for layer in range(3):
        got = slots_of(cache, cache.retrieval.select(memory, layer, q))
        keys = memory.k[layer, memory.video_start : memory.video_end].view(40, 4, 2, 16)[:38]
        frame = keys.mean(1).repeat_interleave(7, dim=1).flatten(1)  # KV heads repeated to query heads, heads in a row
        best = (frame @ q.mean(0).flatten()).topk(5).indices.sort().values
        expected = (memory.video_start + best[:, None] * 4 + torch.arange(4)).flatten()
        assert torch.equal(got, expected)


def test_retrieving_everything_is_attending_to_everything() -> None:
    whole, slots = ask(filled(retrieval="none"))
    assert not slots
    for settings in ({"retrieval": "mean_key", "retrieval_ratio": 1.0}, {"retrieval": "frame"}):
        same, slots = ask(filled(**settings))
        assert not slots and torch.equal(whole, same)
    some, slots = ask(filled(retrieval="mean_key"))
    assert slots and not torch.allclose(whole, some)


@pytest.mark.parametrize("positions", ["packed", "original"])
def test_positions(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed numbers the tokens attended to 0, 1, 2, ...; original keeps the gaps that retrieval leaves."""
    cache = filled(retrieval="mean_key", positions=positions, recent_frames=3)
    seen = []
    angles = cache.rope.angles

    def record(numbers: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(numbers.clone())
        return angles(numbers, like)

    monkeypatch.setattr(cache.rope, "angles", record)
    _, slots = ask(cache)
    new = 1 + len(QUESTION)
    if positions == "packed":
        (numbers,) = seen  # the same in every layer
        assert torch.equal(numbers, torch.arange(3 + 8 * 8 + 160 - 18 * 8 + new))
    else:
        for layer, numbers in enumerate(seen):
            retrieved = slots[layer] - cache.memory.base
            rest = torch.arange(3 + 18 * 8, 3 + 160 + new)
            assert torch.equal(numbers.long(), torch.cat((torch.arange(3), retrieved, rest)))


def test_the_retrieved_part_stays_during_the_answer() -> None:
    cache = filled(retrieval="mean_key")
    embeds = cache.adapter.embed_question(QUESTION)[None]
    with cache.question() as turn, torch.no_grad():
        cache.adapter.language_model(inputs_embeds=embeds, past_key_values=cache)
        first = {layer: blocks.clone() for layer, blocks in turn.blocks.items()}
        for _ in range(3):
            cache.adapter.language_model(inputs_embeds=embeds[:, -1:], past_key_values=cache)
        assert all(torch.equal(first[layer], turn.blocks[layer]) for layer in first)
    _, second = ask(cache)
    assert all(torch.equal(slots_of(cache, first[layer]), second[layer]) for layer in first)


@pytest.mark.parametrize("policy", ["full", "recent", "vision_sink", "similarity", "clip_merge"])
def test_representatives_follow_the_memory(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made as frames come, only those that are not there, and they are those of a memory seen for the first
    time, whatever moved."""
    made = []
    summarize = livevlm.retrieval.summarize_blocks

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(int((kwargs["seq_lens"] - kwargs["first_token"])[0]) // kwargs["block_size"])
        return summarize(*args, **kwargs)

    monkeypatch.setattr(livevlm.retrieval, "summarize_blocks", counting)
    cache = filled(retrieval="mean_key", policy=policy, budget=200)
    q = torch.randn(3, 14, 16)
    for i, count in enumerate((40, 1, 1, 3, 40, 2)):
        cache.push(pixels(count, seed=i), times(count, 40 + 50 * i))
        blocks = cache.retrieval.num_candidates(cache.memory)
        mine, fresh = cache.retrieval.summaries(cache.memory), Retrieval(cache.config, 4).summaries(cache.memory)
        assert torch.equal(mine[:, :blocks], fresh[:, :blocks])
        assert made.pop() == blocks, "the fresh one makes all"
        before = len(made)
        ask(cache)
        assert len(made) == before, "no question had to wait for them"
    assert policy != "full" or 0 < min(made) <= 2, "of a frame or two"
    chosen = (retrieval.select(cache.memory, 1, q) for retrieval in (Retrieval(cache.config, 4), cache.retrieval))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("queries", [None, "all"])
def test_mass_is_that_of_the_question(queries: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By definition: the share of attention, un-rotated, that the last row, or all, pay to a block, over all heads."""
    cache = filled(retrieval="mass", retrieval_ratio=0.2, retrieval_queries=queries)
    memory, q = cache.memory, torch.randn(5, 14, 16)
    rows = q[4:] if queries is None else q
    count = cache.retrieval.num_candidates(memory)
    assert count == 19 and cache.retrieval.num_selected(memory) == 4
    for layer in range(3):
        k = memory.k[layer, memory.video_start : memory.video_start + 8 * count].double()
        logits = torch.einsum("qhd,khd->hqk", rows.double(), k.repeat_interleave(7, 1)) / 4
        mass = logits.softmax(-1).sum((0, 1)).unflatten(0, (count, 8)).sum(1)
        assert torch.equal(cache.retrieval.select(memory, layer, q).long(), mass.topk(4).indices.sort().values)
    made = []
    monkeypatch.setattr(livevlm.retrieval, "summarize_blocks", lambda *args, **kwargs: made.append(1))
    cache.push(pixels(1), times(1, 40))
    ask(cache)
    assert not made, "no representatives are needed"


@pytest.mark.parametrize("retrieval", ["mean_key", "mass", "frame"])
def test_which_queries_choose(retrieval: str) -> None:
    cache, q = filled(retrieval=retrieval, num_retrieved_frames=5), torch.randn(5, 14, 16)

    def chosen(queries: str | None, q: torch.Tensor) -> torch.Tensor:
        config = dataclasses.replace(cache.config, retrieval_queries=queries)
        return Retrieval(config, 4).select(cache.memory, 1, q)

    assert torch.equal(chosen("last", q), chosen("all", q[4:]))
    assert not torch.equal(chosen("last", q), chosen("all", q))
    assert torch.equal(chosen(None, q), chosen("last" if retrieval == "mass" else "all", q))


@pytest.mark.parametrize("retrieval", ["mean_key", "mass"])
def test_a_planted_key_is_found(retrieval: str) -> None:
    """The block whose keys match the question's queries is retrieved, whatever its age (raw keys, as LiveVLM says)."""
    cache = filled(retrieval=retrieval, retrieval_ratio=0.1)
    memory = cache.memory
    q = torch.randn(5, 14, 16)
    target = memory.video_start + 7 * 8
    per_kv_head = q.mean(0).view(2, 7, 16).mean(1)
    with memory.moving():
        memory.k[:, target : target + 8] = 20 * per_kv_head
    for layer in range(3):
        assert target in slots_of(cache, cache.retrieval.select(memory, layer, q)).tolist()


def test_reading_never_copies_the_memory_when_all_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(retrieval="none")
    calls = []
    table_of = Read._block_table
    monkeypatch.setattr(Read, "_block_table", lambda self, layer, q: calls.append(table_of(self, layer, q)))
    ask(cache)
    assert calls == [None, None, None]
