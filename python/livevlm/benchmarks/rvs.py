# SPDX-License-Identifier: Apache-2.0
"""RVS-Ego and RVS-Movie: open questions in streams, asked at their `end_time`; a judge decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format
from livevlm.benchmarks.schema import Malformed, Problem, Video


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    if not conversations.is_conversations(fields.as_object(value)):
        raise Malformed("'conversations' is missing")
    video = conversations.parse(value, where, problems)
    kept = []
    group = "movie" if video.clip is not None or "movie" in path.stem else "ego"
    for index, query in enumerate(video.queries):
        if query.ask_time is None:
            problems.append(Problem(where, f"turn {index + 1}: 'end_time' is missing"))
        else:
            kept.append(replace(query, task=query.task or f"RVS-{group.capitalize()}", group=group))
    return [replace(video, queries=tuple(kept))]


RVS = Format(
    "rvs",
    "RVS-Ego and RVS-Movie",
    parse,
    files=("*_oe.json", "*/*_oe.json"),
    averages=(Average("per question", "questions"),),
    folders=("", "videos", "ego/videos", "movie/videos", "ego", "movie"),
)
