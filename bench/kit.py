# SPDX-License-Identifier: Apache-2.0
"""How every benchmark here measures, so that its numbers can be trusted and compared.

- Nothing is timed before its result was compared with the reference. What computes something else on purpose (a peer's
  definition that differs) has a name that ends with "(other result)".
- Cold L2: each call works on another set of tensors; together they are more than five times the L2 cache.
- GPU time is that of a captured CUDA graph that holds one call per set, so no launch from Python is in it. This
  flatters eager code: a loop over layers, called from Python, takes many times as long as its row says.
- Ops that work in place get their inputs restored between samples, outside the time that is taken.
- Providers take turns, so that a change of clocks or temperature meets all of them.
- The ceiling is a device copy, measured in the same run. `ratio` is the time in units of that of the backend that
  "auto" takes: how many times faster that one is.
- Median, 20th and 80th percentile. With --results, rows go to <op>.csv there, one per (op, provider, shape, dtype, GPU,
  versions).
- A provider that cannot be captured, or needs too much memory, is reported with the reason and left out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = ("op", "provider", "shape", "dtype", "gpu", "versions")
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")  # the first that is there is what "auto" takes
OTHER_RESULT = " (other result)"

SECONDS = 0.15  # of samples for each provider
PROVIDER_MEMORY = 20e9  # bytes that a provider may allocate
TOTAL_MEMORY = 60e9  # bytes for the inputs and all providers of a shape: each graph keeps its own

Inputs = dict[str, Tensor]
Provider = Callable[[Inputs], Any]
Call = Callable[[], Any]


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
    ratio: float
    columns: dict[str, Any] = field(default_factory=dict)  # further columns of this op


class Unmeasurable(Exception):
    """Why a provider cannot be timed here."""


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, help="folder of CSV files to update; the table is always printed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for the shapes of one measurement; forgets what was compiled for earlier ones."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of distinct memory behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cold_sets(make: Callable[[], Inputs], device: str) -> list[Inputs]:
    """As many sets of inputs as it takes for each to have left the L2 cache before its next turn."""
    cold = 5 * torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0
    sets = [make(), make()]
    size = nbytes(list(sets[0].values()))
    while len(sets) * size <= cold:
        sets.append(make())
    distinct = nbytes([t for one in sets for t in one.values()])
    if distinct <= cold:
        raise RuntimeError(f"the inputs are not cold: {len(sets)} sets share memory, {distinct} distinct bytes in all")
    return sets


class Graph:
    """Calls captured into a CUDA graph. `before` is called ahead of each sample, outside its time."""

    def __init__(self, calls: Sequence[Call], before: Call | None = None) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up where capturing would: compilers and workspaces must be ready
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.count, self.before, self.graph = len(calls), before, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def microseconds(self) -> float:
        """Time of one call, over one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.before:
            self.before()
        torch.cuda._sleep(500_000)  # the GPU is busy while the replay is launched, so that launching isn't timed
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.count


class Wall:
    """The same on a CPU, by the clock."""

    def __init__(self, calls: Sequence[Call], before: Call | None = None) -> None:
        self.calls, self.count, self.before = calls, len(calls), before
        calls[0]()

    def microseconds(self) -> float:
        if self.before:
            self.before()
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) * 1e6 / self.count


def timer(calls: Sequence[Call], device: str, before: Call | None = None) -> Graph | Wall:
    return (Graph if device == "cuda" else Wall)(calls, before)


def measure(timers: dict[str, Graph | Wall], device: str) -> dict[str, list[float]]:
    """Microseconds a call, sorted, of each timer."""
    warm_until = time.perf_counter() + (0.1 if device == "cuda" else 0.0)  # by time: clocks rise under load
    while True:
        once = {name: each.microseconds() for name, each in timers.items()}
        if time.perf_counter() >= warm_until:
            break
    most = 50 if device == "cuda" else 5
    rounds = {name: int(SECONDS * 1e6 / (once[name] * each.count)) for name, each in timers.items()}
    rounds = {name: max(5, min(most, number)) for name, number in rounds.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(max(rounds.values(), default=0)):
        for name, each in timers.items():
            if turn < rounds[name]:
                samples[name].append(each.microseconds())
    return {name: sorted(times) for name, times in samples.items()}


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def copy_ceiling(device: str) -> float:
    """GB/s of a copy, bytes read and written: the faster of the driver's and an elementwise kernel's."""
    count = 2**28 if device == "cuda" else 2**24  # of 4 bytes each
    pairs = [torch.rand(2, count, device=device) for _ in range(2)]
    ways = {
        "driver": [lambda p=p: p[0].copy_(p[1]) for p in pairs],
        "kernel": [lambda p=p: torch.neg(p[1], out=p[0]) for p in pairs],
    }
    times = measure({name: timer(calls, device) for name, calls in ways.items()}, device)
    return 2 * 4 * count / min(quantile(ordered, 0.5) for ordered in times.values()) / 1e3


def matmul_ceiling(device: str) -> float:
    """TFLOP/s of a square bf16 matmul, for ops that the tensor cores may bound."""
    size = 8192 if device == "cuda" else 512
    squares = [torch.randn(3, size, size, device=device).bfloat16() for _ in range(2)]
    calls = [lambda s=s: torch.matmul(s[1], s[2], out=s[0]) for s in squares]
    return 2 * size**3 / quantile(measure({"matmul": timer(calls, device)}, device)["matmul"], 0.5) / 1e6


def probe(call: Call) -> int:
    """Bytes that a call allocates on the GPU at its peak, once it is warm.

    Raises:
        RuntimeError: the call waits for the GPU, which a graph cannot hold. Found out here, because a capture that
            fails leaves the process in a doubtful state.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.cuda.max_memory_allocated() - held


class Bench:
    """All measurements of one op.

    As a context manager it lets a script measure everything there is: a provider with a wrong result, or a backend
    that does not run, is left out, and ends the script with an error only after the last measurement.
    """

    def __init__(self, op: str, device: str, results: Path | None) -> None:
        self.op, self.device, self.results = op, device, results
        self.gpu, self.versions, self.ceiling = device_name(device), versions(), copy_ceiling(device)
        self.failures: list[str] = []
        self.raise_at_once = True
        torch.manual_seed(0)
        print(f"{op} on {self.gpu}; {self.versions}; copy {self.ceiling:.0f} GB/s")
        print(f"  {'shape':<50} {'dtype':<9} {'provider':<36} {'median us':>9}", end=" ")
        print(f"{'p20':>8} {'p80':>8} {'GB/s':>6} {'copy':>5} {'ratio':>6}")

    def __enter__(self) -> Bench:
        self.raise_at_once = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.failures:
            raise SystemExit("\n".join([f"{self.op}: {len(self.failures)} failed", *self.failures]))

    def run(
        self,
        shape: str,
        dtype: torch.dtype,
        make: Callable[[], Inputs],
        moved: int,
        providers: dict[str, Provider],
        check: Callable[[Any, Any], None] = torch.testing.assert_close,
        *,
        in_place: bool = False,
        columns: Callable[[float], dict[str, Any]] = lambda median_us: {},
    ) -> list[Row]:
        """Compares and times `providers`; the first is the reference.

        Args:
            moved: bytes the op must read and write.
            in_place: providers may change their inputs. They must return what they wrote, for `check`.
            columns: further columns of a row, from its median time.
        """
        sets = cold_sets(make, self.device)
        originals = [{name: t.clone() for name, t in one.items()} for one in sets] if in_place else []

        def restore() -> None:
            for one, original in zip(sets, originals, strict=True):
                for name, tensor in one.items():
                    tensor.copy_(original[name])

        def inputs() -> Inputs:
            return {name: t.clone() for name, t in originals[0].items()} if in_place else sets[0]

        expected = next(iter(providers.values()))(inputs())
        timers: dict[str, Graph | Wall] = {}
        memory = nbytes([t for one in (*sets, *originals) for t in one.values()])
        for name, provider in providers.items():
            try:
                memory += self._prepare(name, provider, inputs, expected, check, memory)
                calls = [lambda p=provider, s=s: p(s) for s in sets]
                timers[name] = timer(calls, self.device, restore if in_place else None)
            except Exception as error:  # whatever a compiler or a peer's formula may raise
                wrong = isinstance(error, AssertionError)
                said = str(error) if isinstance(error, Unmeasurable) else f"{type(error).__name__}: {error}"
                reason = " ".join(said.split())[:160]
                print(f"  {shape:<50} {str(dtype)[6:]:<9} {name:<36} {'WRONG' if wrong else 'n/a'}: {reason}")
                if wrong or name in BACKENDS[:-1]:
                    self.failures.append(f"{shape}, {name}: {reason}")
        rows = self._rows(shape, str(dtype).removeprefix("torch."), moved, measure(timers, self.device), columns)
        if self.results is not None and rows:
            save(self.results / f"{self.op}.csv", rows)
        if self.failures and self.raise_at_once:
            raise AssertionError("\n".join(self.failures))
        return rows

    def _prepare(
        self, name: str, provider: Provider, inputs: Callable[[], Inputs], expected: Any, check: Any, used: int
    ) -> int:
        """Checks and warms a provider; returns the bytes it needs, with `used` bytes in use by others."""
        result = provider(inputs())
        if not name.endswith(OTHER_RESULT):
            check(result, expected)
        del result
        if self.device != "cuda":
            return 0
        fresh = inputs()
        try:
            needed = probe(lambda: provider(fresh))
        except RuntimeError as error:
            raise Unmeasurable(f"cannot be captured: {error}") from None
        if needed > PROVIDER_MEMORY or used + needed > TOTAL_MEMORY:
            raise Unmeasurable(f"needs {needed / 1e9:.0f} GB, beside {used / 1e9:.0f} GB of inputs and other providers")
        return needed

    def _rows(
        self,
        shape: str,
        dtype: str,
        moved: int,
        measured: dict[str, list[float]],
        columns: Callable[[float], dict[str, Any]],
    ) -> list[Row]:
        date, rows = datetime.date.today().isoformat(), []
        medians = {name: quantile(times, 0.5) for name, times in measured.items()}
        unit = next((medians[name] for name in (*BACKENDS, *medians) if name in medians), 1.0)
        for name, times in measured.items():
            median, p20, p80 = medians[name], quantile(times, 0.2), quantile(times, 0.8)
            speed = moved / median / 1e3
            row = Row(
                self.op, name, shape, dtype, self.gpu, self.versions, round(median, 2), round(p20, 2), round(p80, 2),
                round(speed, 1), round(100 * speed / self.ceiling, 1), date, round(median / unit, 2), columns(median),
            )  # fmt: skip
            print(
                f"  {shape:<50} {dtype:<9} {name:<36} {median:9.1f} {p20:8.1f} {p80:8.1f} {speed:6.0f} "
                f"{row.percent_of_copy:4.0f}% {row.ratio:6.2f}",
                *(f" {title} {value}" for title, value in row.columns.items()),
            )
            rows.append(row)
        return rows


def save(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file; a row with the same key replaces the old one. Columns that a row lacks are empty."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(old[name] for name in KEY): old for old in csv.DictReader(file)}
    for row in rows:
        new = asdict(row)
        new |= new.pop("columns")
        table[tuple(new[name] for name in KEY)] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table.values() for name in row)), restval="")
        writer.writeheader()
        writer.writerows(table.values())
