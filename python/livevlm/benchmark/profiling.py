# SPDX-License-Identifier: Apache-2.0
"""Where each millisecond goes: GPU time of a call's kernels, by what they do, and the time in which none ran."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from livevlm.benchmark import timing
from livevlm.benchmark.live import Live
from livevlm.benchmark.report import Row, row
from livevlm.benchmark.subject import Subject
from livevlm.benchmark.timing import Limit

if TYPE_CHECKING:
    from livevlm.benchmark.parts import Plan

# By name of the kernel, first match; GEMMs of vision and language models are told apart by profiling vision alone.
KINDS = {
    # Our CUDA kernels are told by the struct of their arguments, or by the name of the op.
    "compression": r"(Compact|Evict|Merge|Nearest|NearestWgmma|Order|Redundancy|Score|Select)Kernel|LongRows|"
    r"score_tokens|select_tokens|compact_tokens|evict_similar|merge_tokens|redundancy|novelty|quantize|radix|sort|topk",
    "retrieval": r"RetrieveKernel|summarize|retrieve|fill_table",
    "attention": r"AttentionKernel|TileAttention|attend|flash|fmha|cudnn_generated|mha|merge_states|combine",
    "linear": r"gemm|nvjet|cutlass|xmma|cublas|splitK|gemv|conv|(product|project|gated)(_rows)?_kernel",
    "copies": r"[Mm]emcpy|[Mm]emset|copy_|CatArray",
}
TOP = 12


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "elementwise")


def exclusive(kernels: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Names and times of kernels, given with start and end, such that all add up to the time in which one ran.

    A kernel may start while the one before it runs, and wait for that: its time counts from the other's end.
    """
    shares, busy_until = [], -math.inf
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        shares.append((name, max(0.0, end - max(start, busy_until))))
        busy_until = max(busy_until, end)
    return shares


def _kernels(
    call: Any, device: torch.device, calls: int = 1
) -> tuple[Mapping[str, float], list[tuple[str, float, int]], float]:
    """Milliseconds by kind, the longest kernels, and wall time in ms of a call: the mean of so many.

    How often a kernel ran is counted over all of them.
    """
    wall = timing.spread([sum(timing.milliseconds(call, device) for _ in range(calls)) / calls for _ in range(5)])[0]
    with torch_profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        timing.synchronise(device)
    on_device = (event for event in seen.events() or () if event.device_type.name == "CUDA")
    shares = exclusive((event.name, event.time_range.start, event.time_range.end) for event in on_device)
    by_kind: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in shares:
        by_kind[kind_of(name)] += microseconds / 1e3 / calls
        by_name[name] += microseconds / 1e3 / calls
    counts = Counter(name for name, _ in shares)
    longest = sorted(by_name, key=lambda name: -by_name[name])[:TOP]
    return by_kind, [(name, by_name[name], counts[name]) for name in longest], wall


def profile(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """Kernels of reading 1 and 8 frames, of the vision tower alone, and of a question; on a GPU only."""
    device = subject.device
    if device.type != "cuda":
        return
    live = Live(subject, **dict(plan.settings))
    adapter = live.stream.cache.adapter
    live.watch(live.stream.cache.budget // adapter.tokens_per_frame + 8, 8)
    size = adapter.image_size
    pixels = torch.randn(8, 3, size, size, device=device, dtype=adapter.dtype)

    @torch.no_grad()
    def vision(count: int) -> None:
        adapter.embed_frames(pixels[:count])

    calls = {
        "vision, 1 frame": lambda: vision(1),
        "vision, 8 frames": lambda: vision(8),
        "read, 1 frame": lambda: live.push(1),
        "read, 8 frames": lambda: live.push(8),
        "question, first token": lambda: live.ask(0),
        "question, 17 tokens": lambda: live.ask(16),
    }
    cycles = {"read, 1 frame": live.cycle(1), "read, 8 frames": live.cycle(8)}  # a compression belongs to several calls
    for name, call in calls.items():
        for _ in range(4):
            call()
        repeats = cycles.get(name, 1)
        by_kind, longest, wall = _kernels(call, device, repeats)
        for kind, spent in sorted(by_kind.items()):
            yield row("profile", name, f"{kind} ms", [spent])
        yield row("profile", name, "no kernel runs ms", [wall - sum(by_kind.values())])
        yield row("profile", name, "wall ms", [wall])
        for kernel, took, count in longest:
            yield row("profile", name, "kernel ms", [took], note=f"{count} x in {repeats} calls: {kernel[:90]}")
        if limit.passed:
            return
