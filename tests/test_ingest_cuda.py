# SPDX-License-Identifier: Apache-2.0
"""Reading on a GPU: replayed clips give the same bits, nothing waits, memory stays flat, sources come by threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import livevlm
from livevlm import Stream
from livevlm.policies import POLICIES
from livevlm.repeated import WARM
from livevlm.synthetic import generate
from test_clips import eventually
from test_stream import bits

pytestmark = pytest.mark.cuda

SIZES = [8] * 4 + [1, 3, 8] * 6


@pytest.fixture(scope="module")
def tiny() -> livevlm.Checkpoint:
    return livevlm.load("tiny", device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return generate(sum(SIZES), seed=5)[0].frames


def stream_of(tiny: livevlm.Checkpoint, **settings: object) -> Stream:
    defaults = {"policy": "vision_sink", "budget": 160, "clip_frames": 8, "graphs": "on"}
    return Stream(tiny.model, tiny.processor, dataclasses.replace(tiny.config, **defaults | settings))


@pytest.mark.parametrize("positions", ["packed", "original", "spread"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_replayed_clips_give_the_same_bits(
    tiny: livevlm.Checkpoint, frames: torch.Tensor, policy: str, positions: str
) -> None:
    """Also with questions between them, whose graphs use the same memory for what they need while they run."""
    streams = [stream_of(tiny, policy=policy, positions=positions, graphs=way) for way in ("on", "off")]
    for stream in streams:
        for turn, clip in enumerate(frames.split(SIZES)):
            stream.push(clip)
            if turn % 4 == 3:
                stream.ask("where was the red star ?")
    assert all(torch.equal(a, b) for a, b in zip(*map(bits, streams), strict=True))
    replayed, expected = streams[0].stats().num_replayed_clips, len(SIZES) - 3 * WARM
    assert 0 < replayed < expected if policy == "full" else replayed == expected, streams[0].stats()
    assert streams[0].ask("what colour was the star ?") == streams[1].ask("what colour was the star ?")
    streams[0].ask("what colour was the star ? " * 300)  # the memory grows, and moves
    for stream in streams:
        for clip in frames[:8].split([1] * 8):
            stream.push(clip)
    assert all(torch.equal(a, b) for a, b in zip(*map(bits, streams), strict=True))
    assert streams[0].stats().why_eager == "" and streams[0].stats().vision == "by hand"


def test_what_does_not_read_in_place_is_not_replayed(tiny: livevlm.Checkpoint, frames: torch.Tensor) -> None:
    stream = stream_of(tiny, attention="sdpa", graphs="auto")
    for clip in frames[:8].split(1):
        stream.push(clip)
    assert stream.stats().num_replayed_clips == 0 and "not read in place" in stream.stats().why_eager


def test_nothing_waits_for_the_gpu(tiny: livevlm.Checkpoint, frames: torch.Tensor) -> None:
    for way in ("on", "off"):
        stream, there = stream_of(tiny, graphs=way), frames[:4].cuda()
        for _ in range(20):
            stream.push(there)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stream.push(there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (stream.stats().num_replayed_clips > 0) == (way == "on")


def test_memory_is_flat_and_questions_fit_between(tiny: livevlm.Checkpoint, frames: torch.Tensor) -> None:
    stream, used = stream_of(tiny), []
    for turn in range(120):
        stream.push(frames[: 1 + turn % 8])
        if turn % 3 == 0:
            stream.ask("where was the red star ?")
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[60:])) == 1, used[60:]


def test_a_source_gives_the_same_memory(tiny: livevlm.Checkpoint, frames: torch.Tensor) -> None:
    """Frames of another size, resized by a thread on a stream of its own, while clips are captured and replayed."""
    large = torch.nn.functional.interpolate(frames, scale_factor=2.5, mode="nearest")
    pushed, watched = stream_of(tiny), stream_of(tiny)
    for clip in large.split(4):
        pushed.push(clip)

    def source() -> Iterator[tuple[float, torch.Tensor]]:
        return ((float(i), frame) for i, frame in enumerate(large[8:]))

    for clip in large[:8].split(4):  # so many that the next one is captured, by another thread
        watched.push(clip)
    with watched.watching(source(), clip_frames=4, start=8.0) as feed:
        eventually(lambda: watched.stats().num_frames > 8)
        answers = [watched.ask("where was the red star ?") for _ in range(3)]
        feed.wait(60)
    assert len(answers) == 3 and feed.stats().num_frames == len(large) - 8
    assert all(torch.equal(a, b) for a, b in zip(bits(pushed), bits(watched), strict=True))
    assert watched.stats().num_replayed_clips > 5


def test_a_capture_that_fails_is_told(
    tiny: livevlm.Checkpoint, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, plain = stream_of(tiny, graphs="auto"), stream_of(tiny, graphs="off")
    embed = stream.cache.adapter.embed_frames

    def waits(pixels: torch.Tensor) -> torch.Tensor:
        torch.ones(1, device="cuda").item()
        return embed(pixels)

    monkeypatch.setattr(stream.cache.adapter, "embed_frames", waits)
    for clip in frames.split(SIZES):
        stream.push(clip)
        plain.push(clip)
    assert "could not be captured" in stream.stats().why_eager
    assert all(torch.equal(a, b) for a, b in zip(bits(plain), bits(stream), strict=True))
