# SPDX-License-Identifier: Apache-2.0
"""How every benchmark here measures, so that its numbers can be trusted and compared.

- Nothing is timed before its result was compared with the reference.
- Cold L2: each call works on another set of tensors; together they are more than five times the L2 cache.
- GPU time is that of a captured CUDA graph that holds one call per set, so no launch from Python is in it.
- Providers take turns, so that a change of clocks or temperature meets all of them.
- The ceiling is a device copy, measured in the same run.
- Median, 20th and 80th percentile. With --results, rows go to <op>.csv there, one per (op, provider, shape, dtype, GPU,
  versions).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = ("op", "provider", "shape", "dtype", "gpu", "versions")

Inputs = dict[str, Tensor]
Provider = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Row:
    op: str
    provider: str
    shape: str
    dtype: str
    gpu: str
    versions: str
    median_us: float
    p20_us: float
    p80_us: float
    gigabytes_per_s: float
    percent_of_copy: float
    date: str


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, help="folder of CSV files to update; the table is always printed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    def one(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    return ", ".join([f"torch {torch.__version__}", one("triton")])


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of distinct memory behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cold_sets(make: Callable[[], Inputs], device: str) -> list[Inputs]:
    """As many sets of inputs as it takes for each to have left the L2 cache before its next turn."""
    cold = 5 * torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0
    sets = [make(), make()]
    while nbytes([t for one in sets for t in one.values()]) <= cold:
        sets.append(make())
    return sets


class Graph:
    """Calls captured into a CUDA graph."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up where capturing would: compilers and workspaces must be ready
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.count, self.graph = len(calls), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def microseconds(self) -> float:
        """Time of one call, over one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.count


class Wall:
    """The same on a CPU, by the clock."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        calls[0]()

    def microseconds(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(self.calls)


def measure(calls: dict[str, Sequence[Callable[[], Any]]], device: str) -> dict[str, list[float]]:
    """Microseconds a call, sorted, of each named list of calls."""
    timers = {name: (Graph if device == "cuda" else Wall)(list(each)) for name, each in calls.items()}
    warm_until = time.perf_counter() + (0.2 if device == "cuda" else 0.0)  # by time: clocks rise under load
    rounds = 50 if device == "cuda" else 5
    while time.perf_counter() < warm_until:
        for timer in timers.values():
            timer.microseconds()
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.microseconds())
    return {name: sorted(times) for name, times in samples.items()}


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def copy_ceiling(device: str) -> float:
    """GB/s of a copy, bytes read and written: the faster of the driver's and an elementwise kernel's."""
    count = 2**28 if device == "cuda" else 2**25  # of 4 bytes each
    pairs = [torch.rand(2, count, device=device) for _ in range(2)]
    ways = {
        "driver": [lambda p=p: p[0].copy_(p[1]) for p in pairs],
        "kernel": [lambda p=p: torch.neg(p[1], out=p[0]) for p in pairs],
    }
    times = measure(ways, device)
    return 2 * 4 * count / min(quantile(ordered, 0.5) for ordered in times.values()) / 1e3


class Bench:
    """All measurements of one op."""

    def __init__(self, op: str, device: str, results: Path | None) -> None:
        self.op, self.device, self.results = op, device, results
        self.gpu, self.versions, self.ceiling = device_name(device), versions(), copy_ceiling(device)
        print(f"{op} on {self.gpu}; {self.versions}; copy {self.ceiling:.0f} GB/s")
        print(f"  {'shape':<44} {'dtype':<9} {'provider':<20} {'median us':>9}", end=" ")
        print(f"{'p20':>8} {'p80':>8} {'GB/s':>6} {'copy':>5}")

    def run(
        self,
        shape: str,
        dtype: torch.dtype,
        make: Callable[[], Inputs],
        moved: int,
        providers: dict[str, Provider],
        check: Callable[[Any, Any], None] = torch.testing.assert_close,
    ) -> list[Row]:
        """Compares and times `providers`; the first is the reference. `moved`: bytes the op must read and write."""
        sets = cold_sets(make, self.device)
        expected = next(iter(providers.values()))(sets[0])
        for provider in providers.values():
            check(provider(sets[0]), expected)
        calls = {name: [lambda p=p, s=s: p(s) for s in sets] for name, p in providers.items()}
        rows = []
        for name, times in measure(calls, self.device).items():
            median, p20, p80 = (quantile(times, q) for q in (0.5, 0.2, 0.8))
            speed = moved / median / 1e3
            date = datetime.date.today().isoformat()
            row = Row(
                self.op, name, shape, str(dtype).removeprefix("torch."), self.gpu, self.versions, round(median, 2),
                round(p20, 2), round(p80, 2), round(speed, 1), round(100 * speed / self.ceiling, 1), date,
            )  # fmt: skip
            print(
                f"  {shape:<44} {row.dtype:<9} {name:<20} {median:9.1f} {p20:8.1f} {p80:8.1f} {speed:6.0f} "
                f"{row.percent_of_copy:4.0f}%"
            )
            rows.append(row)
        if self.results is not None:
            save(self.results / f"{self.op}.csv", rows)
        return rows


def save(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file; a row with the same key replaces the old one."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(old[name] for name in KEY): old for old in csv.DictReader(file)}
    for row in rows:
        new = asdict(row)
        table[tuple(new[name] for name in KEY)] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(table.values())
