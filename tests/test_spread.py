# SPDX-License-Identifier: Apache-2.0
"""Positions that keep their distances in time, and never leave what the model was trained with."""

from __future__ import annotations

import pytest
import torch

from livevlm import Config, LiveCache
from livevlm.policies import POLICIES
from livevlm.spread import spread
from streams import PROMPT, pixels, times, tiny_random

TOKENS = 4  # a frame of the random model
MOST = 256
BOUNDED = sorted(set(POLICIES) - {"full"})


def watched(num_frames: int, most: int | None = None, **settings: object) -> LiveCache:
    config = {"budget": 64, "slack": 0, "clip_frames": 8, "positions": "spread", **settings}
    cache = LiveCache(tiny_random(), Config(**config))  # type: ignore[arg-type]
    if most is not None:
        cache.adapter.language_model.config.max_position_embeddings = most
    cache.prefill_prompt(PROMPT)
    for start in range(0, num_frames, 8):
        count = min(8, num_frames - start)
        cache.push(pixels(count, start), times(count, start))
    return cache


def answer(cache: LiveCache) -> torch.Tensor:
    with cache.question(), torch.no_grad():
        ids = torch.tensor([[5, 9, 11]])
        return cache.adapter.language_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


@pytest.mark.parametrize("policy", BOUNDED)
def test_a_stream_that_fits_is_numbered_by_its_places(policy: str) -> None:
    near, original = (watched(60, policy=policy, positions=way) for way in ("spread", "original"))
    memory = near.memory
    assert torch.equal(memory.video(memory.k), original.memory.video(original.memory.k))
    assert torch.equal(memory.video(memory.position), original.memory.video(original.memory.position))
    assert near.next_position == original.next_position == len(PROMPT) + 60 * TOKENS
    assert torch.equal(answer(near), answer(original))


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("policy", BOUNDED)
def test_positions_never_leave_what_the_model_knows(policy: str, scope: str) -> None:
    cache = watched(8, MOST, policy=policy, scope=scope)
    for start in range(8, 400, 8):
        cache.push(pixels(8, start), times(8, start))
        memory = cache.memory
        position = memory.video(memory.position)
        step = 0 if policy == "clip_merge" else 1  # a merged token shares the place of its frame's first one
        assert (position.diff(dim=1) >= step).all(), "in the order of the stream"
        assert (position[:, 0] >= len(PROMPT)).all() and cache.next_position + 16 <= MOST
        assert (position[:, -1] == cache.next_position - 1).all(), "what comes next follows the newest token"
        newest = memory.video(memory.frame) == cache.num_frames - 1
        assert newest.sum(1).eq(TOKENS).all()
        assert (position[:, -TOKENS:].diff(dim=1) == 1).all(), "inside of a frame that is whole nothing was forgotten"


def test_gaps_shrink_in_proportion() -> None:
    cache = watched(200, MOST, policy="uniform")
    memory = cache.memory
    position, frame = memory.video(memory.position)[0].double(), memory.video(memory.frame)[0].double()
    place = frame * TOKENS + memory.video(memory.slot)[0]
    order = torch.arange(len(place))
    share = ((position - len(PROMPT) - order) / (place - order).clamp(min=1))[place - order > 50]
    assert len(share) > 30 and share.min() > 0 and (share - share.mean()).abs().max() < 0.03
    assert cache.next_position < cache.num_stream_tokens


def test_without_room_only_the_order_is_left() -> None:
    cache = watched(100, 70)
    memory = cache.memory
    assert torch.equal(memory.video(memory.position)[0], torch.arange(64, dtype=torch.int32) + len(PROMPT))
    assert cache.next_position == len(PROMPT) + 64


def test_it_is_forgotten_with_the_stream() -> None:
    cache = watched(200, MOST)
    cache.reset()
    assert cache.next_position == 0


def test_nothing_forgotten_nothing_nearer() -> None:
    cache = watched(10)
    before = cache.memory.position.clone()
    assert spread(cache.memory, cache.num_stream_tokens, TOKENS, MOST) == 0
    assert torch.equal(cache.memory.position, before)
