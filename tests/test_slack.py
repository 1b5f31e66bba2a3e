# SPDX-License-Identifier: Apache-2.0
"""Small clips pile up above the budget, as far as they may; then the memory is compressed, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import livevlm
from livevlm import Config, ConfigError, LiveCache, Stream
from livevlm.buffers import BUCKETS
from livevlm.synthetic import generate
from streams import PROMPT, pixels, times, tiny_random
from test_failures import content, out_of_memory, same
from test_policies import BOUNDED, TOKENS

BUDGET, CLIP, SLACK = 64, 6, 0.4


def cache_of(**settings: Any) -> LiveCache:
    config = {"policy": "recent", "budget": BUDGET, "recent_frames": 2, "clip_frames": CLIP, "slack": SLACK}
    cache = LiveCache(tiny_random(), Config(**config | settings))
    cache.prefill_prompt(PROMPT)
    return cache


def push(cache: LiveCache, sizes: list[int]) -> list[int]:
    """Pushes of so many frames each; video tokens held after each."""
    held = []
    for size in sizes:
        cache.push(pixels(size, seed=cache.num_frames), times(size, cache.num_frames))
        held.append(cache.memory.num_video_tokens)
    return held


@pytest.mark.parametrize("policy", BOUNDED)
def test_never_more_than_allowed_whatever_the_sizes(policy: str) -> None:
    cache = cache_of(policy=policy)
    most = min(BUDGET * (1 + SLACK), BUDGET + CLIP * TOKENS)
    version, compress, calls = cache.memory.version, cache.policy.compress, []
    cache.policy.compress = lambda *given: (calls.append(1), compress(*given))[0]  # type: ignore[method-assign]
    sizes = [1, 2, 5, 1, 1, 4, 6, 3, 1, 7, 2, 2, 12, 1] * 3
    for size, held in zip(sizes, push(cache, sizes), strict=True):
        assert held <= (BUDGET if size >= CLIP or policy == "clip_merge" else most), (
            "bounded, and to the budget at last"
        )
        facts = {name: cache.memory.video(getattr(cache.memory, name)) for name in ("position", "frame", "slot")}
        newest = torch.arange(max(0, cache.num_frames - 2), cache.num_frames).repeat_interleave(TOKENS)
        assert (facts["frame"][:, -len(newest) :] == newest).all(), "the newest frames are whole"
        whole = facts["slot"] >= 0
        expected = len(PROMPT) + facts["frame"] * TOKENS + facts["slot"]
        assert torch.equal(facts["position"][whole], expected[whole])
    assert cache.memory.version == version, "the memory has not grown"
    clips = sum(-(-size // CLIP) for size in sizes)
    assert len(calls) == clips if policy == "clip_merge" else len(calls) < 0.6 * clips


def test_single_frames_are_compressed_once_in_a_while() -> None:
    steps = int(BUDGET * SLACK) // TOKENS
    held = push(cache_of(), [1] * (BUDGET // TOKENS + 3 * steps))
    piled_up = [BUDGET + (1 + i % steps) * TOKENS for i in range(3 * steps)]
    assert held == [*range(TOKENS, BUDGET + 1, TOKENS), *piled_up]
    assert push(cache_of(slack=0), [1] * 30)[-10:] == [BUDGET] * 10


@pytest.mark.parametrize("policy", BOUNDED)
def test_pushes_of_whole_clips_do_not_depend_on_it(policy: str) -> None:
    caches = [cache_of(policy=policy, slack=slack) for slack in (0, SLACK)]
    for cache in caches:
        push(cache, [6, 6, 20, 9, 6])
    assert same(caches[0], content(caches[1]))


@pytest.mark.parametrize("policy", BOUNDED)
def test_deterministic(policy: str) -> None:
    caches = [cache_of(policy=policy) for _ in range(2)]
    for cache in caches:
        push(cache, [1, 2, 3] * 8)
    assert same(caches[0], content(caches[1]))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["compressing", "reading"])
def test_a_failure_before_or_in_a_clip_loses_nothing(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, twin = cache_of(policy="vision_sink"), cache_of(policy="vision_sink")
    for each in (cache, twin):
        push(each, [1] * 22)
        assert each.memory.num_video_tokens == 88, "the next one is to be compressed for"
    before = content(cache)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        at = cache.adapter.language_model.layers[1].mlp
        patch.setattr(*((cache.policy, "compress") if where == "compressing" else (at, "forward")), fail)
        with pytest.raises(type(error)):
            cache.push(pixels(1, seed=22), times(1, 22))
    assert cache.num_frames == 22
    if where == "compressing":
        assert same(cache, before)
    else:
        assert cache.memory.num_video_tokens == BUDGET, "compressed, as it would have been"
    for each in (cache, twin):
        push(each, [1, 1, 2])
    assert same(cache, content(twin))


def test_moving_that_fails_before_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of()
    push(cache, [1] * 22)
    before = content(cache)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("livevlm.memory.compact_tokens", out_of_memory)
        cache.push(pixels(1), times(1, 22))
    assert same(cache, before) and push(cache, [1]) == [BUDGET + TOKENS]


def test_questions_see_what_is_there() -> None:
    model, processor, _ = livevlm.load("tiny", device="cpu")
    video = generate(24, seed=5)[0]
    stream = Stream(model, processor, Config(policy="recent", budget=256, retrieval="mean_key", clip_frames=8))
    for count, frame in enumerate(video.frames, 1):
        stream.push(frame)
        if count in (16, 20, 22, 23):
            question = "what colour was the star ?"
            before = content(stream.cache)
            first, again = stream.ask(question), stream.ask(question)
            assert first == again and first.evidence == again.evidence and same(stream.cache, before)
            held = stream.stats().num_video_tokens
            assert held == {16: 256, 20: 320, 22: 352, 23: 272}[count]
            assert stream.stats().budget == 256
            version = stream.cache.memory.version
            stream.cache.memory.reserve(BUCKETS[-1] + stream.config.max_new_tokens)
            assert stream.cache.memory.version == version, "room for a question is left"


def test_what_is_no_slack() -> None:
    for slack in (-0.1, 1.5, "much", True):
        with pytest.raises(ConfigError, match="slack="):
            Config(slack=slack)  # type: ignore[arg-type]
