# SPDX-License-Identifier: Apache-2.0
"""Clips that repeat each other: which are replayed, and that a replay needs nothing but its inputs."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch

import livevlm
from livevlm import Config, LiveCache, Stream
from livevlm.graph_pool import GraphPool
from livevlm.ingest import MOST_FRAMES, ClipReader
from livevlm.policies import POLICIES
from livevlm.repeated import TOO_FEW, WARM, Captured, Repeated
from livevlm.synthetic import generate
from test_stream import bits

TOKENS = 16  # of a frame
SIZES = [8, 3, 1, 8, 8, 3, 1, 8, 1, 3, 1, 1, 3, 3, 1, 1, 1, 3, 20, 8, 1]


class Blind(Repeated):
    """Replays on a CPU: launches that were kept, with what the host would say of the clip's place made wrong."""

    def __init__(self, cache: LiveCache) -> None:
        super().__init__(cache.graph_pool, capture=False)
        self.cache: LiveCache = weakref.proxy(cache)

    def find(self, *args: Any, **kwargs: Any) -> tuple[Captured | None, str]:
        captured, why = super().find(*args, **kwargs)
        if captured is None:
            return None, why

        def replay() -> None:
            cache, memory = self.cache, self.cache.memory
            truth, unmoved = (memory.video_end, memory.end, cache.num_frames), (memory.version, cache.queries.count)
            wrong = memory.video_start, memory.video_start + 5, 1000
            memory.video_end, memory.end, cache.num_frames = wrong
            try:
                captured.replay()
                assert wrong == (memory.video_end, memory.end, cache.num_frames)
                assert unmoved == (memory.version, cache.queries.count)
            finally:
                memory.video_end, memory.end, cache.num_frames = truth

        return dataclasses.replace(captured, replay=replay), why


def stream_of(**settings: Any) -> Stream:
    """One that keeps launches in the place of graphs. As on a GPU, embeddings lie row by row: on a CPU, sums follow."""
    config = {"policy": "recent", "budget": 160, "clip_frames": 8, "attention": "cpu"}
    stream = Stream(*livevlm.load("tiny", device="cpu")[:2], Config(**config | settings))
    stream.cache.clips = ClipReader(stream.cache, capture=False)
    stream.cache.clips.keeping = Blind(stream.cache)
    adapter: Any = stream.cache.adapter
    embed = adapter.embed_frames
    adapter.embed_frames = lambda pixels: embed(pixels).contiguous()
    return stream


@pytest.mark.parametrize("positions", ["packed", "original", "spread"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_clips_of_a_size_are_replayed(policy: str, positions: str) -> None:
    """From the third of a size on, however full the memory is."""
    video = generate(sum(SIZES), seed=5)[0]
    streams = [stream_of(policy=policy, positions=positions, graphs=graphs) for graphs in ("auto", "off")]
    times = torch.linspace(3, 40, sum(SIZES), dtype=torch.float64)
    for stream in streams:
        for frames, stamps in zip(video.frames.split(SIZES), times.split(SIZES), strict=True):
            stream.push(frames, times=stamps)
    assert all(torch.equal(a, b) for a, b in zip(*map(bits, streams), strict=True))
    stats = streams[0].stats()
    clips = [part for size in SIZES for part in ([8, 8, 4] if size == 20 else [size])]
    expected = sum(max(0, clips.count(size) - WARM) for size in set(clips))
    if policy == "full":  # it grew on the way, and moved
        assert 0 < stats.num_replayed_clips < expected
    else:
        assert stats.num_replayed_clips == expected and stats.why_eager == ""
    assert streams[1].stats().num_replayed_clips == 0 and streams[1].stats().why_eager == "graphs='off'"


def test_what_has_moved_is_captured_anew() -> None:
    stream, frames = stream_of(), generate(8, seed=5)[0].frames
    for frame in frames[:4]:
        stream.push(frame)
    assert stream.stats().num_replayed_clips == 2
    version = stream.cache.memory.version
    stream.ask("what colour was the star ? " * 300)  # makes the memory grow
    assert stream.cache.memory.version != version
    for frame, why in zip(frames[4:], (*[TOO_FEW] * WARM, "", ""), strict=True):
        stream.push(frame)
        assert stream.stats().why_eager == why
    stream.cache.reset()
    stream.push(frames[:1], times=[9.0])
    assert stream.stats().why_eager == TOO_FEW


@pytest.mark.parametrize("which", ["seeing", "keeping"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_replay_that_fails_loses_nothing(
    which: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = generate(16, seed=3)[0].frames
    stream, twin = stream_of(policy="vision_sink"), stream_of(policy="vision_sink")
    for each in (stream, twin):
        each.push(frames[:12].repeat(2, 1, 1, 1), times=range(24))
        for i in range(3):
            each.push(frames[i], times=[24.0 + i])
    before, clips = bits(stream), stream.cache.clips
    repeated = getattr(clips, which)
    key = next(key for key in repeated.graphs if key == TOKENS or (isinstance(key, tuple) and key[0][0] == 1))
    captured = repeated.graphs[key]

    def replay() -> None:
        captured.replay()
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setitem(repeated.graphs, key, dataclasses.replace(captured, replay=replay))
        stream.push(frames[3], times=[27.0])
    stats = stream.stats()
    assert stats.num_frames == 27 and all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))
    for each in (stream, twin):
        each.push(frames[3], times=[27.0])
        each.push(frames[4:9], times=range(28, 33))
    assert all(torch.equal(a, b) for a, b in zip(bits(stream), bits(twin), strict=True))
    assert stream.ask("what colour was the star ?") == twin.ask("what colour was the star ?")


@pytest.mark.parametrize(
    ("settings", "num_frames", "why"),
    [
        ({"attention": "auto"}, 1, "not read in place"),
        ({"attention": "sdpa"}, 1, "not read in place"),
        ({"graphs": "off"}, 1, "graphs='off'"),
        ({"clip_frames": 32}, MOST_FRAMES + 1, f"more than {MOST_FRAMES} frames"),
        ({}, 1, "CUDA graphs need a GPU"),
    ],
)
def test_what_is_not_replayed_says_why(settings: dict[str, Any], num_frames: int, why: str) -> None:
    stream = stream_of(**settings)
    if "GPU" in why:
        stream.cache.clips = ClipReader(stream.cache)
    for _ in range(5):
        stream.push(generate(num_frames, seed=1)[0].frames)
    assert why in stream.stats().why_eager and stream.stats().num_replayed_clips == 0


def test_graphs_share_memory_until_the_last_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pool, graphs = GraphPool(), [type("Graph", (), {})() for _ in range(2)]
    for graph in graphs:
        assert pool.handle() == 0
        pool.add(graph)
    del graph, graphs[0]
    assert pool.handle() == 0
    graphs.clear()
    assert pool.handle() == 1


def test_what_replays_would_not_notice() -> None:
    """Hooks on the vision tower are called for every clip; weights that moved are where a graph does not look."""
    stream = stream_of()
    tower = stream.cache.adapter.model.model.vision_tower
    frames, calls = generate(1, seed=1)[0].frames, []

    def push(count: int) -> str:
        for _ in range(count):
            stream.push(frames)
        return stream.stats().why_eager

    assert push(15) == ""
    handle = tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert push(4) == "a SiglipEncoderLayer has hooks" and len(calls) == 4
    handle.remove()
    assert push(1) == TOO_FEW and push(WARM) == ""
    tower.embeddings.position_embedding.weight.data = tower.embeddings.position_embedding.weight.data.clone()
    assert push(1) == TOO_FEW and push(WARM) == ""
