# SPDX-License-Identifier: Apache-2.0
"""Runs parts of the benchmark and writes what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from livevlm.benchmark import plots, timing
from livevlm.benchmark.parts import PARTS, Plan
from livevlm.benchmark.report import Report, Row, environment
from livevlm.benchmark.subject import Subject


def run(
    subject: Subject,
    plan: Plan,
    parts: Sequence[str],
    *,
    folder: Path,
    limit: float,
    draw: bool,
    tell: Callable[[str], None],
    show: Callable[[Row], None],
) -> list[Path]:
    """The files written.

    Args:
        limit: seconds for each part; what a call has begun, it ends.
        tell: is told what is measured next; show: each figure.
    """
    facts = {"model": subject.name, "frames": plan.frames, "repeats": plan.repeats, "limit": limit}
    facts |= {"settings": dict(plan.settings), "question_tokens": 1 + len(subject.question_ids)}
    report = Report(folder, f"stream_{subject.name}", {**environment(subject.device), **facts})
    for name in parts:
        tell(name)
        timing.free(subject.device)
        rows = []
        for row in PARTS[name](subject, plan, timing.Limit(limit)):
            rows.append(row)
            show(row)
            report.replace(name, rows)
    written = [report.path, report.path.with_suffix(".csv")]
    if draw:
        device = report.facts["device"]
        written += plots.draw(report.rows, f"{subject.name}, {device}", folder, f"stream_{subject.name}")
    return written
