# SPDX-License-Identifier: Apache-2.0
"""Plots of a comparison: accuracy against the budget for each length, and against the length for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livevlm.benchmark.plots import _pyplot as pyplot_or_error
from livevlm.evaluating.report import CHANCE_LEVEL, Row

LABEL = "questions about the past answered right"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes `accuracy-<n>-frames` and, for several lengths, `accuracy-<n>-percent`, as PNG and SVG."""
    pyplot, written = pyplot_or_error(), []
    lengths = sorted({row.frames for row in rows})
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    for length in lengths:
        here = [row for row in rows if row.frames == length]
        title = f"{length} frames, {max(row.streams for row in here)} streams"
        written += _figure(
            pyplot, here, "budget", budgets, "tokens kept (%)", title, folder / f"accuracy-{length}-frames"
        )
    for budget in budgets if len(lengths) > 1 else ():
        here = [row for row in rows if row.budget in (budget, None)]
        title = f"{budget:g} % of the tokens"
        written += _figure(pyplot, here, "frames", lengths, "frames", title, folder / f"accuracy-{budget:g}-percent")
    return written


def _figure(
    pyplot: Any, rows: Sequence[Row], axis: str, ticks: Sequence[float], label: str, title: str, path: Path
) -> list[Path]:
    figure, axes = pyplot.subplots(figsize=(8.0, 4.8), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    names = list(dict.fromkeys(row.label for row in rows))
    for place, name in enumerate(names):
        own = sorted((row for row in rows if row.label == name), key=lambda row: getattr(row, axis) or 0)
        colour = colours[place % len(colours)]
        y, half = [row.accuracy for row in own], [row.ci95 for row in own]
        if axis == "budget" and own[0].budget is None:
            axes.axhline(y[0], linestyle="--", color=colour, label=name)
        else:
            apart = 1.004 ** (place - len(names) / 2)  # so that intervals do not hide each other
            x = [getattr(row, axis) * apart for row in own]
            axes.errorbar(x, y, yerr=half, marker="o", markersize=4, capsize=2, color=colour, label=name)
    axes.axhline(CHANCE_LEVEL, linestyle=":", color="gray", label="guess")
    axes.set(xlabel=label, ylabel=LABEL, title=title, ylim=(0, 1.02), xscale="log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for each in paths:
        figure.savefig(each, dpi=150)
    pyplot.close(figure)
    return paths
