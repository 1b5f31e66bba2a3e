# SPDX-License-Identifier: Apache-2.0
"""Rows from records: what each setting answered right, beside `full` on the same videos."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from livevlm.config import Config
from livevlm.evaluating.records import Key
from livevlm.evaluating.settings import Setting
from livevlm.evaluating.statistics import Counts, Estimate, accuracy, difference
from livevlm.synthetic import CHANCE, KINDS
from livevlm.types import Positions

MEMORY_KINDS = tuple(kind for kind in KINDS if not kind.startswith("now_"))
"""Questions about the past. The newest frame answers the others, and that is always kept."""
CHANCE_LEVEL = sum(CHANCE[kind] for kind in MEMORY_KINDS) / len(MEMORY_KINDS)


@dataclass(frozen=True)
class Row:
    """One setting at one length.

    Attributes:
        budget: percent of the stream's tokens, None where there is none to choose.
        accuracy, ci95: mean of the kinds of question about the past, and half its 95 % interval.
        to_full, to_full_ci95: how much higher it is than that of `full` without retrieval (at positions of the
            default, if that was run) on the same videos. NaN where it was not run.
        all_kinds: mean of all eight kinds.
        tokens, tokens_most: of video kept in a layer, at the end of a stream and at most after any clip.
        bytes: of keys and values, at the end, on average.
        kinds: accuracy of each kind; NaN where none was asked.
    """

    frames: int
    setting: str
    positions: str
    budget: float | None
    streams: int
    questions: int
    accuracy: float
    ci95: float
    to_full: float
    to_full_ci95: float
    all_kinds: float
    tokens: float
    tokens_most: int
    tokens_seen: int
    bytes: float
    ms_per_frame: float
    ms_per_answer: float
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.setting if self.positions == Config.positions else f"{self.setting}, {self.positions}"


class _Group:
    """The records of one setting and length, by video."""

    def __init__(self, records: dict[int, dict[str, Any]]) -> None:
        self.records = records

    def counts(self, videos: Sequence[int], kinds: Sequence[str]) -> tuple[Counts, Counts]:
        """Asked and right, `[num_videos, num_kinds]`."""
        asked, right = np.zeros((len(videos), len(kinds))), np.zeros((len(videos), len(kinds)))
        for place, video in enumerate(videos):
            for kind, _, _, is_right in self.records[video]["answers"]:
                if kind in kinds:
                    asked[place, kinds.index(kind)] += 1
                    right[place, kinds.index(kind)] += is_right
        return asked, right

    def mean(self, name: str) -> float:
        return sum(record[name] for record in self.records.values()) / len(self.records)


def rows_of(by_key: dict[Key, dict[str, Any]]) -> list[Row]:
    """A row for each length and setting that there are records of."""
    groups: dict[tuple[int, Setting], dict[int, dict[str, Any]]] = defaultdict(dict)
    for (num_frames, index, preset, retrieval, positions, budget), record in by_key.items():
        groups[num_frames, Setting(preset, retrieval, positions, budget)][index] = record
    rows = []
    for num_frames, setting in sorted(groups, key=lambda group: (group[0], group[1].rank)):
        full = next((groups[key] for key in _full(num_frames) if key in groups), {})
        rows.append(_row(num_frames, setting, _Group(groups[num_frames, setting]), _Group(full)))
    return rows


def _full(num_frames: int) -> list[tuple[int, Setting]]:
    """What all are compared with: the first of these that was run."""
    return [(num_frames, Setting("full", "none", positions, None)) for positions in get_args(Positions)]


def _row(num_frames: int, setting: Setting, group: _Group, full: _Group) -> Row:
    videos = sorted(group.records)
    past, everything = group.counts(videos, MEMORY_KINDS), group.counts(videos, KINDS)
    value, to_full = accuracy(*past), Estimate(math.nan, math.nan)
    shared = sorted(set(videos) & set(full.records))
    if shared:
        asked, right = group.counts(shared, MEMORY_KINDS)
        to_full = difference(asked, right, full.counts(shared, MEMORY_KINDS)[1])
    with np.errstate(invalid="ignore"):
        by_kind = everything[1].sum(0) / everything[0].sum(0)
    count = len(group.records[videos[0]]["answers"])
    return Row(
        frames=num_frames,
        setting=setting.name,
        positions=setting.positions,
        budget=setting.budget,
        streams=len(videos),
        questions=count,
        accuracy=value.value,
        ci95=value.half,
        to_full=to_full.value,
        to_full_ci95=to_full.half,
        all_kinds=accuracy(*everything).value,
        tokens=group.mean("tokens"),
        tokens_most=max(record["most_tokens"] for record in group.records.values()),
        tokens_seen=int(group.mean("seen")),
        bytes=group.mean("bytes"),
        ms_per_frame=1e3 * group.mean("read_seconds") / num_frames,
        ms_per_answer=1e3 * group.mean("answer_seconds") / count,
        kinds=dict(zip(KINDS, by_kind.tolist(), strict=True)),
    )


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    """None for what was not measured, such as the difference to a `full` that was not run: JSON has no NaN."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in facts.items()}


def _nested(row: Row) -> dict[str, Any]:
    return _known({**asdict(row), "kinds": _known(row.kinds)})


def _flat(row: Row) -> dict[str, Any]:
    facts = _nested(row)
    facts |= facts.pop("kinds")
    return {key: round(v, 5) if isinstance(v, float) else v for key, v in facts.items()}


def write(rows: Sequence[Row], facts: dict[str, Any], folder: Path) -> list[Path]:
    """`results.json`, `.csv` and `.md`; the files written."""
    paths = [folder / f"results.{kind}" for kind in ("json", "csv", "md")]
    content = {"facts": facts, "chance": CHANCE_LEVEL, "rows": [_nested(row) for row in rows]}
    paths[0].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_flat(rows[0])))
        writer.writeheader()
        writer.writerows(_flat(row) for row in rows)
    paths[2].write_text(markdown(rows, facts))
    return paths


# -------------------------------------------------------------------- Markdown
def _number(value: float, half: float | None = None, *, sign: bool = False) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if half is None or math.isnan(half) else f"{text} ± {half:.3f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)] + [""]


def markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Tables for people: accuracy and its distance from `full` by budget, then every figure of each setting."""
    text = [
        "# Answers about generated videos",
        "",
        "Mean of the six kinds of question about the past (not `now_shape`, `now_colour`), with 95 % intervals over "
        f"videos. A guess among each kind's answers is right {CHANCE_LEVEL:.3f} of the time; `blind` keeps only the "
        "newest frame. Budgets are in percent of the whole stream's tokens, kept at every moment; `rekv` keeps all and "
        "retrieves so many.",
        "",
        ", ".join(f"{name}: {value}" for name, value in facts.items()),
        "",
    ]
    for num_frames in dict.fromkeys(row.frames for row in rows):
        here = [row for row in rows if row.frames == num_frames]
        streams = sorted({row.streams for row in here})
        text += [f"## {num_frames} frames, {' to '.join(map(str, streams[:: max(1, len(streams) - 1)]))} streams", ""]
        budgets: list[float | None] = [*sorted({row.budget for row in here if row.budget is not None}, reverse=True)]
        columns = [f"{budget:g} %" for budget in budgets] or ["all"]
        for title, show in (("accuracy", _accuracy), ("minus `full`, same videos", _to_full)):
            lines = []
            for label in dict.fromkeys(row.label for row in here):
                by_budget = {row.budget: show(row) for row in here if row.label == label}
                lines.append([label, *(by_budget.get(b, by_budget.get(None, "-")) for b in budgets or [None])])
            text += _table([title, *columns], lines)
        head = ["setting", "budget", *KINDS, "all kinds", "tokens", "KiB", "ms a frame", "ms an answer"]
        text += _table(head, (_details(row) for row in here))
    return "\n".join(text)


def _accuracy(row: Row) -> str:
    return _number(row.accuracy, row.ci95)


def _to_full(row: Row) -> str:
    return _number(row.to_full, row.to_full_ci95, sign=True)


def _details(row: Row) -> list[str]:
    kinds = ["-" if math.isnan(value) else f"{value:.2f}" for value in row.kinds.values()]
    budget = "" if row.budget is None else f"{row.budget:g} %"
    kept = f"{row.tokens:.0f} of {row.tokens_seen}"
    times = [f"{value:.2f}" for value in (row.ms_per_frame, row.ms_per_answer)]
    return [row.label, budget, *kinds, _number(row.all_kinds), kept, f"{row.bytes / 1024:.0f}", *times]
