# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of attention and retrieval add to `kit`.

Environment: ONLY, a regular expression that the shape of a case must match; PEERS=0 leaves out what isn't ours.
"""

from __future__ import annotations

import datetime
import os
import re
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kit

PEERS = os.environ.get("PEERS", "1") != "0"
ERROR, ROW_ERROR = 0.008, 0.03  # allowed, relative: of everything, and of one query in one head


def wanted(shape: str) -> bool:
    return re.search(os.environ.get("ONLY", ""), shape) is not None


class PartlyRead(dict[str, Tensor]):
    """Inputs of which a call reads little, or a provider only some: a pool, another layout.

    `kit` takes the values it sees for what a call brings into L2. It doesn't see `hidden` ones, and so makes more sets:
    enough to be cold without those.
    """

    def __init__(self, inputs: dict[str, Tensor], hidden: Sequence[str]) -> None:
        super().__init__(inputs)
        self.hidden = hidden

    def values(self) -> list[Tensor]:  # type: ignore[override]
        return [tensor for name, tensor in self.items() if name not in self.hidden]


def checked_only(reference: kit.Provider) -> kit.Provider:
    """Gives what others are compared with and is not timed: it takes many times as long as all of them together."""
    results = [reference]

    def once(inputs: kit.Inputs) -> object:
        if not results:
            raise kit.Unmeasurable("compared with, not timed")
        return results.pop()(inputs)

    return once


def close(result: Tensor, expected: Tensor) -> None:
    """Errors in relation to what is expected: outputs are small where many keys are averaged.

    Rounding to bf16 (rotated keys, probabilities, output) takes 0.3 %. One key of 2,000 that is wrong makes 2 %.
    """
    difference, size = (result.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    error, worst = (difference.norm() / size.norm()).item(), (difference / size).max().item()
    assert error <= ERROR, f"relative error {error:.4f}"
    assert worst <= ROW_ERROR, f"relative error {worst:.4f} in one row"


def close_by_name(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Providers of one case may compute different things, each under its name."""
    for name, mine in result.items():
        close(mine, expected[name])


# ---------------------------------------------------------------- calls from Python
def from_python(calls: Sequence[kit.Call], device: str) -> list[float]:
    """Microseconds a call, sorted, of calls that follow one another as a model's layers do: launches count."""
    samples = []
    for _ in range(20 if device == "cuda" else 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6 / len(calls))
    return sorted(samples[len(samples) // 4 :])


def record(
    bench: kit.Bench, shape: str, moved: int, measured: dict[str, list[float]], rows: Sequence[kit.Row]
) -> list[kit.Row]:
    """Rows for times that were taken in another way, in units of the same backend's as `rows`, which are its case's."""
    new = []
    unit = rows[0].median_us / rows[0].ratio if rows and rows[0].ratio else 1.0
    for name, times in measured.items():
        median, p20, p80 = (kit.quantile(times, q) for q in (0.5, 0.2, 0.8))
        speed = moved / median / 1e3
        row = kit.Row(
            bench.op, name, shape, rows[0].dtype if rows else "", bench.gpu, bench.versions, round(median, 2),
            round(p20, 2), round(p80, 2), round(speed, 1), round(100 * speed / bench.ceiling, 1),
            datetime.date.today().isoformat(), round(median / unit, 2),
        )  # fmt: skip
        print(f"  {shape:<50} {row.dtype:<9} {name:<36} {median:9.1f} {p20:8.1f} {p80:8.1f} {'':>12} {row.ratio:6.2f}")
        new.append(row)
    if bench.results is not None and new:
        kit.save(bench.results / f"{bench.op}.csv", new)
    return new


def called_from_python(
    bench: kit.Bench,
    shape: str,
    make: Callable[[], kit.Inputs],
    moved: int,
    providers: dict[str, kit.Provider],
    rows: Sequence[kit.Row],
) -> None:
    """Providers without a graph."""
    sets = kit.cold_sets(make, bench.device)[:32]  # with many small ones it is launches that take the time
    measured = {}
    for name, provider in providers.items():
        calls = [lambda p=provider, s=s: p(s) for s in sets]
        measured[f"{name}, from Python"] = from_python(calls, bench.device)
    record(bench, shape, moved, measured, rows)


# ---------------------------------------------------------------- cost
def visible_pairs(num_queries: int, num_keys: int) -> int:
    """Pairs of a query and a key it sees, where queries are the last tokens."""
    return num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
