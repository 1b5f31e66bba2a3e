# SPDX-License-Identifier: Apache-2.0
"""StreamingBench: real-time, omni-source, contextual (SQA) and proactive questions, each asked at its time stamp."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format
from livevlm.benchmarks.prompts import LETTER_ONLY
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video

PATIENCE = 4  # seconds after the true time for which a proactive question goes on polling
PARTS = ("real", "omni", "sqa", "proactive")


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    """An entry with `questions`; a list of entries about one video, in order (SQA); or the conversations form."""
    group = next((part for part in PARTS if re.search(rf"(^|_){part}", path.stem)), "real")
    if conversations.is_conversations(value):
        video = conversations.parse(value, where, problems)
        return [replace(video, queries=tuple(replace(query, group=group) for query in video.queries))]
    entries = value if isinstance(value, list) else [value]
    history: list[tuple[str, str]] = []
    videos = []
    for entry in (fields.as_object(entry) for entry in entries):
        file = fields.text(entry, "video_path")
        queries: list[Query] = []
        for index, item in enumerate(fields.items(entry, "questions")):
            try:
                query = _query(fields.as_object(item, "the question"), group, where)
            except Malformed as error:
                problems.append(Problem(where, f"question {index + 1}: {error}"))
                continue
            if group == "sqa":
                queries.append(replace(query, history=tuple(history)))
                history.append((query.text, _gold(query)))
            else:
                queries.append(query)
        videos.append(Video(_name(file), (file,), tuple(queries), where))
    return videos


def _query(item: dict[str, Any], group: str, where: str) -> Query:
    asked = fields.clock(item, "time_stamp")
    question, task = fields.text(item, "question"), fields.text(item, "task_type", default=group)
    if item.get("ground_truth_time_stamp") is not None:
        truth = fields.clock(item, "ground_truth_time_stamp")
        # Once a second, from the second after the question on.
        polls = tuple(asked + 1 + i for i in range(max(0, math.floor(truth + PATIENCE - asked))))
        if not polls:
            raise Malformed("'ground_truth_time_stamp' is too long before 'time_stamp'")
        output = fields.text(item, "ground_truth_output")
        return Query("proactive", question, output, task=task, group=group, polls=polls, truth_time=truth, where=where)
    options = fields.options(item, "options")
    answer = fields.letter(fields.get(item, "answer"), options)
    return Query("choice", question, answer, options, asked, task=task, group=group, where=where)


def _gold(query: Query) -> str:
    return query.options[ord(query.answer) - ord("A")] if query.kind == "choice" else query.answer


def _name(file: str) -> str:
    """`sample_1` of ".../sample_1/video.mp4", else the file's own name."""
    path = PurePosixPath(file)
    return path.parent.name if path.stem == "video" and path.parent.name else path.stem


def _files(folder: str, form: str = "") -> str:
    """The four parts, in one of their two forms: both hold the same questions."""
    return "|".join(f"{folder}questions_{part}{form}.json" for part in PARTS)


STREAMINGBENCH = Format(
    "streamingbench",
    "StreamingBench",
    parse,
    files=(
        *(_files(folder) for folder in ("", "*/", "src/data/")),
        *(_files(folder, "_stream") for folder in ("", "*/", "src/data/")),
        "streamingbench*.json",
        "*/streamingbench*.json",
    ),
    averages=(
        Average("real-time, mean of tasks", "tasks", ("real",)),
        Average("real-time, per question", "questions", ("real",)),
        Average("all, per question", "questions"),
    ),
    fps=1.0,
    prompt=LETTER_ONLY,
)
