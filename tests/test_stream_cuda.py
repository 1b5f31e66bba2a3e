# SPDX-License-Identifier: Apache-2.0
"""Streams on a GPU: the same answers as on the CPU, stock transformers' hidden states, flat memory."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

import livevlm
from livevlm import Config, LiveCache, Stream
from livevlm.staging import Pinned
from livevlm.synthetic import generate
from streams import PROMPT, pixels, real_config, times, tiny_random
from test_parity import FULL, ask, clip_sizes, stock, streamed

pytestmark = pytest.mark.cuda

SETTINGS = {
    "full": {"policy": "full"},
    "similarity": {"policy": "similarity"},
    "vision_sink": {"policy": "vision_sink", "scope": "shared"},
    "clip_merge": {"policy": "clip_merge", "scope": "shared"},
    "uniform": {"policy": "uniform"},
    "mean_key": {"policy": "full", "retrieval": "mean_key", "pooling": "softmax"},
    "frame": {"policy": "similarity", "retrieval": "frame", "num_retrieved_frames": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_answers_as_on_the_cpu(name: str) -> None:
    config = Config(**{"budget": 256, "retrieval": "none", "clip_frames": 8, **SETTINGS[name]})
    answers: dict[str, list[str]] = {}
    for device in ("cpu", "cuda"):
        checkpoint = livevlm.load("tiny", device=device, dtype=torch.float32)
        answers[device] = []
        for video in generate(48, seed=400, num_videos=3):
            stream = Stream(checkpoint.model, checkpoint.processor, config)
            stream.push(video.frames)
            answers[device] += [stream.ask(q.text) for q in video.questions(16, seed=1)]
    same = sum(a == b for a, b in zip(answers["cpu"], answers["cuda"], strict=True))
    assert same >= 46, f"{same} of 48"  # a tie between two scores may fall the other way


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("clip", [1, 5, 7, 24])
def test_close_to_stock_chunked(clip: int, dtype: torch.dtype, tolerance: float) -> None:
    """Not bit-equal: the flash kernel reads causality from a flag, stock transformers from a mask."""
    with torch.device("cuda"):
        model = tiny_random(dtype).cuda()
    frames = [part.cuda() for part in pixels(24).split(clip_sizes(clip))]
    expected = stock(model, frames).float()
    error = (streamed(model, frames, FULL).float() - expected).norm() / expected.norm()
    assert error < tolerance


def test_gpu_memory_is_flat() -> None:
    gc.collect()  # what other tests left
    model = tiny_random().cuda()
    cache = LiveCache(model, Config(policy="vision_sink", budget=1024, retrieval="none", clip_frames=64))
    cache.prefill_prompt(PROMPT)
    clip = pixels(64).cuda()
    used = []
    for start in range(0, 64 * 60, 64):
        cache.push(clip, times(64, start))
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[20:])) == 1, used


def test_frames_of_any_layout_come_through_pinned_buffers() -> None:
    """Also while those before are still on their way: what a buffer held has left it when it is filled anew."""
    pinned, moved, expected = Pinned(torch.device("cuda"), 2), [], []
    for count in (1, 8, 2, 32, 3, 8, 8, 8):
        frames = torch.randint(0, 256, (count, 3, 360, 640), dtype=torch.uint8)
        last = torch.randint(0, 256, (count, 360, 640, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        for each in (frames, last, frames[:, :, ::2, 5:]):
            torch.cuda._sleep(2_000_000)
            moved.append(pinned(each))
            expected.append(each)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, expected, strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(moved[:2], expected[:2], strict=True))


def test_out_of_gpu_memory_while_growing() -> None:
    """Really so: the process may have a few megabytes more, and policy "full" needs more than that."""
    model = tiny_random().cuda()
    cache = LiveCache(model, Config(policy="full", retrieval="none", clip_frames=64))
    cache.prefill_prompt(PROMPT)
    clip = pixels(64).cuda()
    cache.push(clip, times(64))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64e6) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="nothing was lost"):
            for start in range(64, 64 * 4000, 64):
                cache.push(clip, times(64, start))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    seen, kept = cache.num_frames, cache.memory.k[:, : cache.memory.end].clone()
    assert cache.memory.num_video_tokens == 4 * seen and cache.memory.num_new_tokens == 0
    assert ask(cache).isfinite().all()
    assert torch.equal(cache.memory.k[:, : cache.memory.end], kept)
    cache.push(clip, times(64, seen))
    assert cache.num_frames == seen + 64


def test_a_real_shape_with_default_settings() -> None:
    """The 0.5B shape (group size 7, 196 tokens a frame) in bfloat16 with random weights, beyond the default budget."""
    with torch.device("cuda"):
        model = LlavaOnevisionForConditionalGeneration._from_config(real_config("0.5B"), dtype=torch.bfloat16).eval()
    stream = Stream(model, livevlm.load("tiny", device="cpu").processor)
    clip = torch.randint(0, 256, (32, 3, 360, 640), dtype=torch.uint8)
    for _ in range(3):
        stream.push(clip)
    stats = stream.stats()
    assert (stats.num_seen_tokens, stats.num_video_tokens) == (96 * 196, 12_000)
    assert stats.kv_bytes == (12_000 + 2) * 12_288
    memory = stream.cache.memory
    before = [t[:, : memory.video_end].clone() for t in memory.tensors]
    first, second = (stream.ask("what colour was the star ?", max_new_tokens=4) for _ in range(2))
    assert first == second and first.num_tokens == second.num_tokens and first.evidence == second.evidence
    assert all(torch.equal(t[:, : memory.video_end], b) for t, b in zip(memory.tensors, before, strict=True))
    assert not memory.k[:, memory.base : memory.video_end].isnan().any()
