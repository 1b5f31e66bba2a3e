# SPDX-License-Identifier: Apache-2.0
"""Memory policies: bounded, deterministic, and keeping what they say they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import livevlm
from livevlm import Config, LiveCache, Stream
from livevlm.memory import Memory
from livevlm.policies import POLICIES, Policy
from livevlm.policies.base import QueryWindow
from livevlm.rope import Rope
from livevlm.synthetic import generate
from streams import PROMPT, pixels, times, tiny_random

TOKENS = 4  # a frame of the random model
BOUNDED = sorted(set(POLICIES) - {"full"})


def watched(num_frames: int, *, clip: int = 8, seed: int = 1, **settings: object) -> LiveCache:
    config = Config(**{"budget": 64, "slack": 0, "scope": "layer", "recent_frames": 2, "clip_frames": clip, **settings})
    cache = LiveCache(tiny_random(), config)
    cache.prefill_prompt(PROMPT)
    frames = pixels(num_frames, seed)
    for start in range(0, num_frames, clip):
        part = frames[start : start + clip]
        cache.push(part, times(len(part), start))
    return cache


def kept(cache: LiveCache, name: str) -> torch.Tensor:
    return cache.memory.video(getattr(cache.memory, name))


@pytest.mark.parametrize("policy", BOUNDED)
def test_memory_is_constant_over_10000_frames(policy: str) -> None:
    cache = LiveCache(tiny_random(), Config(policy=policy, budget=256, retrieval="none", clip_frames=100))
    cache.prefill_prompt(PROMPT)
    frames = pixels(100)
    facts = set()
    for start in range(0, 10_000, 100):
        cache.push(frames.roll(start // 100, 0), times(100, start))
        memory = cache.memory
        if start >= 1000:  # the budget was reached long ago
            facts.add((memory.num_video_tokens, memory.bytes_used, memory.bytes_allocated, memory.peak_bytes))
    assert cache.num_frames == 10_000
    assert len(facts) == 1, facts
    assert facts.pop()[0] == 256
    assert kept(cache, "frame").max() == 9_999


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_what_is_kept(policy: str, scope: str) -> None:
    cache = watched(50, policy=policy, scope=scope)
    memory = cache.memory
    assert memory.num_video_tokens == 64
    position, frame, slot = kept(cache, "position"), kept(cache, "frame"), kept(cache, "slot")
    assert (position.diff(dim=1) >= 0).all(), "tokens stay in stream order"
    newest = torch.arange(48, 50, dtype=torch.int32).repeat_interleave(TOKENS)
    assert (frame[:, -2 * TOKENS :] == newest).all(), "the newest frames are whole"
    assert torch.equal(memory.position[:, memory.base : memory.video_start], torch.arange(3).expand(3, -1).int())
    whole = slot >= 0
    expected = len(PROMPT) + frame * TOKENS + slot
    assert torch.equal(position[whole], expected[whole]), "facts move together with their token"
    assert torch.equal(kept(cache, "time")[whole], frame[whole].double())
    if scope == "shared" or policy in ("recent", "uniform"):
        assert (position == position[0]).all(), "all layers keep the same tokens"


def test_keys_move_with_their_facts() -> None:
    """Every kept key and value is the one that was written for its position, un-rotated."""
    full = watched(16, policy="full", clip=16)
    for policy in ("recent", "similarity", "vision_sink", "proxy_query", "random"):
        cache = watched(16, policy=policy, clip=16)  # one clip: both read the same context
        for layer in range(3):
            row = kept(cache, "position")[layer].long() + full.memory.base
            assert torch.equal(kept(cache, "k")[layer], full.memory.k[layer, row]), policy
            assert torch.equal(kept(cache, "v")[layer], full.memory.v[layer, row]), policy


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_novelty_keeps_what_its_slot_is_not_used_to(scope: str) -> None:
    """By definition: distances to the mean value of the slot over all frames that were seen, those dropped included,
    and to the token before in the slot."""
    full = watched(50, policy="full", clip=50)
    cache = watched(50, policy="novelty", scope=scope, clip=50)  # one clip: both read the same context
    memory = full.memory
    values = memory.video(memory.v).double().unflatten(1, (-1, TOKENS)).flatten(3)
    change = (values - values.mean(1, keepdim=True)).norm(dim=-1)
    step = torch.full_like(change, torch.inf)
    step[:, 1:] = (values[:, 1:] - values[:, :-1]).norm(dim=-1)
    both = torch.stack((change, step)).flatten(2) / change.flatten(1).mean(1, keepdim=True)
    if scope == "shared":
        both = both.mean(1, keepdim=True).repeat(1, 3, 1)
    novelty = both.amin(0)
    novelty[:, -2 * TOKENS :] = 99
    expected = novelty.argsort(1, descending=True)[:, :64].sort(1).values
    assert torch.equal(kept(cache, "position").long() - len(PROMPT), expected)


@pytest.mark.parametrize("values", [0.0, 1.0], ids=["zero", "one value"])
def test_novelty_does_not_hear_layers_in_which_nothing_changes(values: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no distance to be measured in, or one of rounding errors."""
    compress = POLICIES["novelty"].compress

    def still(self: Policy, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        assert queries.history is not None
        mean = queries.history.mean()
        mean[0] = values
        noise = 1e-7 * values * torch.randn(memory.v[0].shape, generator=torch.Generator().manual_seed(3))
        memory.v[0] = values + noise
        monkeypatch.setattr(type(queries.history), "mean", lambda history: mean)
        compress(self, memory, queries, rope)

    with monkeypatch.context() as patch:
        patch.setattr(POLICIES["novelty"], "compress", still)
        cache = watched(50, policy="novelty", scope="shared", clip=50)
    memory = watched(50, policy="full", clip=50).memory
    seen = memory.video(memory.v).double().unflatten(1, (-1, TOKENS)).flatten(3)[1:]
    change = (seen - seen.mean(1, keepdim=True)).norm(dim=-1)
    step = torch.full_like(change, torch.inf)
    step[:, 1:] = (seen[:, 1:] - seen[:, :-1]).norm(dim=-1)
    novelty = (torch.stack((change, step)).flatten(2) / change.flatten(1).mean(1, keepdim=True)).mean(1).amin(0)
    novelty[-2 * TOKENS :] = 99
    expected = novelty.argsort(descending=True)[:64].sort().values
    assert torch.equal(kept(cache, "position")[1].long() - len(PROMPT), expected)


def mean_of(cache: LiveCache) -> torch.Tensor:
    assert cache.queries.history is not None
    return cache.queries.history.mean()


def test_novelty_remembers_frames_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is that of the values of all frames ever read, in whatever clips they came; a clip that fails after it
    was read is not among them, and neither is a stream before this one."""
    frames, sizes, values = pixels(60, 1), (5, 8, 20, 8, 18, 1), []
    caches = [watched(0, policy="novelty", scope="shared", clip=20, budget=16) for _ in range(2)]
    compress = type(caches[0].policy).compress

    def noting(self: Policy, memory: Memory, *args: Any) -> None:
        values.append(memory.v[:, memory.video_end : memory.end].clone())
        compress(self, memory, *args)

    def failing(*args: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    start = 0
    for part in frames.split(sizes):
        if start:
            before = mean_of(caches[1]).clone()
            with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                patch.setattr(type(caches[1].policy), "compress", failing)
                caches[1].push(part.flip(0), times(len(part), start))
            assert torch.equal(mean_of(caches[1]), before)
        for cache in caches:
            with monkeypatch.context() as patch:
                if cache is caches[0]:
                    patch.setattr(type(cache.policy), "compress", noting)
                cache.push(part, times(len(part), start))
        start += len(part)
    expected = torch.cat(values, 1).unflatten(1, (-1, TOKENS)).double().mean(1)
    assert torch.cat(values, 1).shape[1] == 60 * TOKENS
    torch.testing.assert_close(mean_of(caches[0]).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mean_of(caches[0]), mean_of(caches[1]))
    caches[0].reset()
    caches[0].prefill_prompt(PROMPT)
    caches[0].push(frames[:2], times(2))
    fresh = watched(0, policy="novelty", scope="shared", clip=20, budget=16)
    fresh.push(frames[:2], times(2))
    assert torch.equal(mean_of(caches[0]), mean_of(fresh))


def test_recent_keeps_the_newest() -> None:
    frame = kept(watched(50, policy="recent"), "frame")
    assert torch.equal(frame[0], torch.arange(34, 50, dtype=torch.int32).repeat_interleave(TOKENS))


def test_uniform_keeps_whole_frames_at_even_distances() -> None:
    for length in (100, 200, 1000):
        frame = kept(watched(length, policy="uniform"), "frame")[0].view(-1, TOKENS)
        assert (frame == frame[:, :1]).all(), "whole frames"
        assert frame[0, 0] == 0
        gaps = frame[:-2, 0].diff()  # the last two are the newest, whatever their number
        assert gaps.max() <= 2 * gaps.min(), "no period is forgotten"
        assert gaps.max() <= 2 * length / 14


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("clip", [1, 8])
def test_random_gives_every_token_the_same_chance(scope: str, clip: int) -> None:
    """Over many seeds each tenth of the stream, and each patch slot, has its share of the tokens kept."""
    by_time, by_slot, num_frames = torch.zeros(10), torch.zeros(TOKENS), 42
    for seed in range(40):
        cache = watched(num_frames, policy="random", scope=scope, clip=clip, policy_seed=seed)
        frame, slot = (kept(cache, name)[:, : -2 * TOKENS] for name in ("frame", "slot"))
        rows = slice(None) if scope == "layer" else slice(0, 1)
        by_time += torch.bincount(frame[rows].flatten() // 4, minlength=10)
        by_slot += torch.bincount(slot[rows].flatten(), minlength=TOKENS)
    for counts in (by_time, by_slot):
        expected = counts.sum() / len(counts)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 30, counts  # of 9 and 3 degrees of freedom: 28 is exceeded once in a thousand


def test_random_draws_each_token_once() -> None:
    """Who is kept at the end was never evicted, whatever the clips; seeds and layers draw others."""
    rows = [kept(watched(60, policy="random", clip=clip), "position") for clip in (1, 8, 60)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0][0], rows[0][1])
    assert not torch.equal(rows[0], kept(watched(60, policy="random", policy_seed=1), "position"))


@pytest.mark.parametrize("positions", ["packed", "original"])
def test_proxy_query_keeps_what_the_text_behind_the_video_attends_to(positions: str) -> None:
    """The scores of a single compression are the attention of a question made of the same text."""
    full = watched(12, policy="full", clip=12, positions=positions)
    memory, text = full.memory, full.adapter.embed_question(PROMPT)
    attended = torch.zeros(3, memory.num_video_tokens)
    attend = torch.nn.functional.scaled_dot_product_attention

    layer = iter(range(3))

    def watch(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        k_of_head = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        old = memory.num_tokens  # the text's own keys are no part of the softmax
        mass = ((q @ k_of_head.transpose(-1, -2))[..., :old] * kwargs["scale"]).softmax(-1)
        attended[next(layer)] = mass.mean((0, 1, 2))[memory.num_prompt_tokens :]
        return attend(q, k, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, full.question():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        full.adapter.language_model(inputs_embeds=text[None], past_key_values=full, use_cache=True)
    attended[:, -2 * TOKENS :] = torch.inf
    best = attended.topk(20, dim=1).indices.sort().values
    assert torch.equal(
        kept(watched(12, policy="proxy_query", clip=12, budget=20, positions=positions), "position"),
        (best + len(PROMPT)).int(),
    )


def test_proxy_query_asks_with_the_chat_template_and_leaves_no_trace() -> None:
    tiny = livevlm.load("tiny", device="cpu")
    stream = Stream(*tiny[:2], Config(policy="proxy_query", budget=64, slack=0, clip_frames=8))
    assert tiny.processor.tokenizer.decode(stream.cache.template).split() == ["<|im_end|>", "<|im_start|>", "assistant"]
    seen, compress = [], stream.cache.policy.compress

    def watch(memory: Any, queries: Any, rope: Any) -> None:
        if memory.end - memory.video_start > 64:
            assert memory.num_new_tokens == 8 * 16, "the text is gone again"
            seen.append(queries.newest().shape[1])
        compress(memory, queries, rope)

    stream.cache.policy.compress = watch  # type: ignore[method-assign]
    stream.push(generate(24, seed=3)[0].frames)
    assert seen == [4, 4, 4], "the newline that ends the video, and the template"


def test_similarity_drops_what_repeats() -> None:
    """A frame that shows something new in one patch keeps that patch when all else is a still image."""
    model = tiny_random()
    cache = LiveCache(model, Config(policy="similarity", budget=48, alpha=1.0, retrieval="none", clip_frames=8))
    still = pixels(1).repeat(40, 1, 1, 1)
    still[11, :, :28, :28] = pixels(1, seed=9)[0, :, :28, :28]
    cache.prefill_prompt(PROMPT)
    cache.push(still, times(40))
    where = cache.memory.video(cache.memory.frame)
    slots = cache.memory.video(cache.memory.slot)
    assert ((where[0] == 11) & (slots[0] == 0)).any(), "the one patch that changed"


def test_vision_sink_spreads_over_the_stream() -> None:
    spread = kept(watched(120, policy="vision_sink", scatter_ratio=1.0), "frame")
    plain = kept(watched(120, policy="vision_sink", scatter_ratio=0.0), "frame")
    assert not torch.equal(spread, plain)
    by_time = kept(watched(120, policy="vision_sink", scatter_ratio=1.0, bucket_by="time"), "frame")
    old = [(rows < 60).float().mean() for rows in (by_time, plain)]
    assert old[0] > 0.2, "buckets of equal duration keep the stream's first half"


def test_clip_merge_adds_one_token_a_frame() -> None:
    cache = watched(8, policy="clip_merge", budget=64, clip=8, clip_keep_ratio=0.5)
    slot, size = kept(cache, "slot"), kept(cache, "size")
    merged = slot < 0
    assert (merged.sum(1) == 6).all(), "one for each frame that is not among the newest two"
    assert (size[merged] == TOKENS).all()
    assert cache.memory.num_video_tokens == 6 + 6 * TOKENS // 2 + 2 * TOKENS
    full = watched(8, policy="full", clip=8)
    mean = full.memory.video(full.memory.v)[1, :TOKENS].mean(0)
    torch.testing.assert_close(kept(cache, "v")[1, 0], mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_deterministic(policy: str) -> None:
    first, second = watched(30, policy=policy), watched(30, policy=policy)
    for a, b in zip(first.memory.tensors, second.memory.tensors, strict=True):
        assert torch.equal(first.memory.video(a), second.memory.video(b))


def test_one_frame_at_a_time() -> None:
    for policy in BOUNDED:
        cache = watched(40, policy=policy, clip=1)
        assert cache.memory.num_video_tokens == 64, policy
