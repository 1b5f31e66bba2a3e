# SPDX-License-Identifier: Apache-2.0
"""A comparison from its plan to its files."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import livevlm
from livevlm.checkpoint import find_device
from livevlm.errors import ConfigError
from livevlm.evaluating.plan import Plan
from livevlm.evaluating.records import Records, key_of
from livevlm.evaluating.report import Row, rows_of, write
from livevlm.evaluating.settings import Setting
from livevlm.evaluating.workers import Task
from livevlm.evaluating.workers import run as run_tasks
from livevlm.synthetic import TOKENS_PER_FRAME


@dataclass(frozen=True)
class Comparison:
    """What came of it: rows, the files written, and settings left out with the reason."""

    rows: list[Row]
    files: list[Path]
    left_out: list[str]


def possible(plan: Plan) -> tuple[dict[int, tuple[Setting, ...]], list[str]]:
    """The settings that can be run at each length, and why others cannot."""
    found: dict[int, tuple[Setting, ...]] = {}
    left_out = []
    for num_frames in plan.frames:
        able = []
        for setting in plan.settings:
            try:
                setting.config(num_frames, TOKENS_PER_FRAME, clip_frames=plan.clip_frames, seed=0).budget_tokens(
                    1, TOKENS_PER_FRAME
                )
                able.append(setting)
            except ConfigError as error:
                left_out.append(f"{num_frames} frames, {setting.budget:g} %: {error}")
        found[num_frames] = tuple(able)
    return found, left_out


def compare(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 1,
    plots: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Runs what is not in `folder` yet, and writes results of all that is there, of earlier plans too.

    Args:
        progress: called with the frames watched so far, those found in `folder` included, and all there will be.

    Raises:
        ConfigError: the plan is not possible, or the folder holds results of another protocol.
    """
    able, left_out = possible(plan)
    if not any(able.values()):
        raise ConfigError("no setting is possible: " + "; ".join(left_out))
    records = Records(folder, {**plan.facts(), **_versions()})
    tasks: list[Task] = []
    done = total = 0
    for index in range(plan.streams):
        for num_frames in plan.frames:
            missing = tuple(s for s in able[num_frames] if key_of(num_frames, index, s) not in records.by_key)
            total += num_frames * len(able[num_frames])
            done += num_frames * (len(able[num_frames]) - len(missing))
            if missing:
                tasks.append((num_frames, index, missing))
    progress(done, total)
    try:
        with closing(run_tasks(plan, tasks, min(processes, max(1, len(tasks))))) as results:
            for record in results:
                records.add(record)
                done += record["key"][0]
                progress(done, total)
    finally:
        records.close()
    rows = rows_of(records.by_key)
    facts = {**plan.facts(), **_versions(), "processes": processes, "machine": _machine(plan.device)}
    files = write(rows, facts, folder)
    if plots:
        from livevlm.evaluating.plots import draw

        files += draw(rows, folder)
    return Comparison(rows, files, left_out)


def _versions() -> dict[str, Any]:
    return {
        "livevlm": livevlm.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _machine(device: str) -> str:
    target = find_device(device)
    return torch.cuda.get_device_name(target) if target.type == "cuda" else platform.machine()
