# SPDX-License-Identifier: Apache-2.0
"""Clocks and meters."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Limit:
    """A part's time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._end


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call, until the GPU has done it."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def sampled(call: Callable[[], float], repeats: int, limit: Limit, warm: int = 2) -> list[float]:
    """What a call says, `repeats` times, after `warm` times for nothing; once at least."""
    for _ in range(warm):
        if not limit.passed:
            call()
    samples = [call()]
    while len(samples) < repeats and not limit.passed:
        samples.append(call())
    return samples


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)
    low, middle, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))
    return middle, low, high


def free(device: torch.device) -> None:
    """Lets go of what is not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gpu_bytes(device: torch.device) -> dict[str, float]:
    """Bytes that this process holds: tensors now and at most, what the allocator took, and what the GPU misses."""
    if device.type != "cuda":
        return {}
    left, total = torch.cuda.mem_get_info(device)
    return {
        "GPU tensors": torch.cuda.memory_allocated(device),
        "GPU peak": torch.cuda.max_memory_allocated(device),
        "GPU reserved": torch.cuda.memory_reserved(device),
        "GPU in use": total - left,
    }


def host_bytes() -> float | None:
    """Resident memory of this process; None where the system does not say."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    return float(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a device copy, read and written."""
    count = 2**28 if device.type == "cuda" else 2**22
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best * 1e3
