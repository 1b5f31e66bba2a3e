# SPDX-License-Identifier: Apache-2.0
"""Plots of a report: TTFT, memory and time a frame against frames of history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livevlm.benchmark.report import Row
from livevlm.errors import ConfigError

BY_HISTORY = ("live", "kept", "oneshot")
COLOURS = {"livevlm": "tab:blue", "stock": "tab:orange", "stock one-shot": "tab:red"}
PLOTS = {
    "ttft": ("TTFT ms", "time to first token (ms)"),
    "decode": ("decode ms/token", "decoding (ms a token)"),
    "encode": ("encode ms/frame", "reading (ms a frame)"),
    "memory": ("GPU peak GB", "GPU memory at most (GB)"),
    "host": ("host GB", "host memory (GB)"),
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'livevlm[bench]', or use --no-plots") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: Sequence[Row], title: str, folder: Path, name: str) -> list[Path]:
    """Writes `<name>-<plot>.png` and `.svg`; plots without data are left out. The files written."""
    pyplot, written = _pyplot(), []
    for plot, (metric, label) in PLOTS.items():
        of_metric = [row for row in rows if row.metric == metric and row.history and row.part in BY_HISTORY]
        measured = [row for row in of_metric if row.median is not None]
        if not measured:
            continue
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        for system in sorted({row.system for row in measured}):
            own = sorted((row for row in measured if row.system == system), key=lambda row: row.history or 0)
            x, y = [row.history for row in own], [row.median for row in own]
            colour, low, high = COLOURS.get(system), [row.p20 for row in own], [row.p80 for row in own]
            axes.plot(x, y, marker="o", label=system, color=colour)
            axes.fill_between(x, low, high, alpha=0.2, color=colour)
            end = next((row for row in of_metric if row.system == system and "out of memory" in row.note), None)
            if end is not None:
                axes.annotate("out of memory", (x[-1], y[-1]), xytext=(4, 6), textcoords="offset points", fontsize=8)
        least = [row.median for row in rows if row.system == "floor" and row.metric == "decode ms/token"]
        if least and plot in ("ttft", "decode"):
            axes.axhline(least[0], linestyle="--", color="gray", label="one read of the weights")
        axes.set(xscale="log", xlabel="frames of history", ylabel=label, title=title)
        histories = sorted({row.history for row in measured if row.history})
        axes.set_xticks(histories, [str(history) for history in histories], rotation=30)
        axes.minorticks_off()
        if plot in ("ttft", "decode", "encode"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        for kind in ("png", "svg"):
            written.append(folder / f"{name}-{plot}.{kind}")
            figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written
