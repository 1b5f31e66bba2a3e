# SPDX-License-Identifier: Apache-2.0
"""Clips that repeat each other: which are replayed, and that a replay needs nothing but its inputs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import livevlm
from livevlm import Config, Stream
from livevlm.ingest import MOST_FRAMES, WARM_CLIPS, ClipReader, _Captured
from livevlm.policies import POLICIES
from livevlm.synthetic import generate
from test_stream import bits

BOUNDED = sorted(set(POLICIES) - {"full"})


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on a CPU: a replay reads a clip from the graph's own tensors, and may change nothing that Python keeps."""

    def capture(self: ClipReader, key: Any, frames: torch.Tensor, normalise: Any) -> None:
        cache, memory = self.cache, self.cache.memory
        static, facts = torch.empty_like(frames), torch.empty(2 + len(frames), dtype=torch.float64)

        def replay() -> None:
            before = (memory.video_start, memory.video_end, memory.end, cache.queries.count, memory.version)
            cache.read_clip(static, facts, normalise)
            assert before == (memory.video_start, memory.video_end, memory.end, cache.queries.count, memory.version)

        self._graphs[key] = _Captured(SimpleNamespace(replay=replay), static, facts, ())  # type: ignore[arg-type]

    def why_not(self: ClipReader, frames: torch.Tensor) -> str:
        return original(self, SimpleNamespace(is_cuda=True, shape=frames.shape))  # type: ignore[arg-type]

    original = ClipReader._why_not
    monkeypatch.setattr(ClipReader, "_capture", capture)
    monkeypatch.setattr(ClipReader, "_why_not", why_not)


@pytest.mark.parametrize("policy", BOUNDED)
def test_clips_of_a_full_memory_are_replayed(policy: str, pretended: None) -> None:
    model, processor, _ = livevlm.load("tiny", device="cpu")
    video = generate(52, seed=5)[0]
    config = Config(policy=policy, budget=160, clip_frames=8)
    streams = [Stream(model, processor, replace(config, graphs=graphs)) for graphs in ("auto", "off")]
    sizes = [8] * 4 + [1, 3] * 5
    times = torch.linspace(3, 40, sum(sizes), dtype=torch.float64)
    for stream in streams:
        for frames, stamps in zip(video.frames[: sum(sizes)].split(sizes), times.split(sizes), strict=True):
            stream.push(frames, times=stamps)
    assert all(torch.equal(a, b) for a, b in zip(*map(bits, streams), strict=True))
    stats = streams[0].stats()
    assert stats.num_replayed_clips >= 2 * (5 - WARM_CLIPS) - 1 and stats.why_eager == ""
    assert streams[1].stats().num_replayed_clips == 0 and streams[1].stats().why_eager == "graphs='off'"
    # A question that makes the memory grow moves it: what was captured is void.
    version = streams[0].cache.memory.version
    streams[0].ask("what colour was the star ? " * 300)
    assert streams[0].cache.memory.version != version
    streams[0].push(video.frames[:1])
    assert streams[0].stats().why_eager == "too few clips like this one yet"


@pytest.mark.parametrize(
    ("settings", "num_frames", "why"),
    [
        ({}, 1, "CUDA graphs need a GPU"),
        ({"policy": "full"}, 1, "policy 'full'"),
        ({"positions": "original"}, 1, "positions='original'"),
        ({}, MOST_FRAMES + 1, f"more than {MOST_FRAMES} frames"),
    ],
)
def test_what_is_not_replayed_says_why(settings: dict[str, Any], num_frames: int, why: str, request: Any) -> None:
    if "GPU" not in why:
        request.getfixturevalue("pretended")
    stream = Stream(*livevlm.load("tiny", device="cpu")[:2], Config(**{"policy": "recent", "budget": 160} | settings))
    for _ in range(5):
        stream.push(generate(num_frames, seed=1)[0].frames)
    assert why in stream.stats().why_eager and stream.stats().num_replayed_clips == 0


def test_what_replays_would_not_notice(pretended: None) -> None:
    """Hooks on the vision tower are called for every clip; weights that moved are where a graph does not look."""
    model, processor, _ = livevlm.load("tiny", device="cpu")
    stream, tower = Stream(model, processor, Config(policy="recent", budget=160)), model.model.vision_tower
    frames, calls = generate(1, seed=1)[0].frames, []

    def push(count: int) -> str:
        for _ in range(count):
            stream.push(frames)
        return stream.stats().why_eager

    assert push(15) == ""
    handle = tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert push(4) == "a SiglipEncoderLayer has hooks" and len(calls) == 4
    handle.remove()
    assert push(1) == "too few clips like this one yet" and push(WARM_CLIPS) == ""
    tower.embeddings.position_embedding.weight.data = tower.embeddings.position_embedding.weight.data.clone()
    assert push(1) == "too few clips like this one yet" and push(WARM_CLIPS) == ""
