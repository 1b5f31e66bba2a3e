# SPDX-License-Identifier: Apache-2.0
"""Questions after some frames of history, to whichever system."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from livevlm.benchmark import timing
from livevlm.benchmark.report import Row, row
from livevlm.benchmark.timing import Limit

TOKENS = 16  # decoded after the first, each time


def questions(
    part: str,
    system: str,
    ask: Callable[[int], tuple[float, float]],
    history: int,
    repeats: int,
    limit: Limit,
    warm: int = 2,
) -> Iterator[Row]:
    steps: list[float] = []

    def one() -> float:
        ttft, step = ask(TOKENS)
        steps.append(step)
        return ttft

    ttfts = timing.sampled(one, repeats, limit, warm)
    yield row(part, system, "TTFT ms", ttfts, history=history)
    yield row(part, system, "decode ms/token", steps[-len(ttfts) :], history=history)
