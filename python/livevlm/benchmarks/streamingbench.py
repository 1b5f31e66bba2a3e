# SPDX-License-Identifier: Apache-2.0
"""StreamingBench: real-time, omni-source, contextual (SQA) and proactive questions, each asked at its time stamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format
from livevlm.benchmarks.prompts import LETTER_ONLY
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video
from livevlm.benchmarks.streamingbench_files import CSV, json_files, options, part_of, place, sample_of

PATIENCE = 4  # seconds after the true time for which a proactive question goes on polling
CONTEXTUAL = ("Anomaly Context Understanding", "Misleading Context Understanding", "Misleading Context Recognition")


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    """An entry with `questions`, a list of those (SQA), a row of a table, or an entry in the conversations form."""
    part = part_of(path)
    if conversations.is_conversations(value):
        video = conversations.parse(value, where, problems)
        return [replace(video, queries=tuple(replace(query, group=part) for query in video.queries))]
    if isinstance(value, dict) and "question_id" in value:
        name, kind, sample = sample_of(fields.text(value, "question_id"), part)
        query = replace(_query(value, part, where), name=name)
        return [Video(f"{kind}_{sample}", place(part, kind, sample), (query,), where)]
    videos = []
    for entry in (fields.as_object(entry) for entry in (value if isinstance(value, list) else [value])):
        file = fields.text(entry, "video_path")
        queries: list[Query] = []
        for index, item in enumerate(fields.items(entry, "questions")):
            try:
                queries.append(_query(fields.as_object(item, "the question"), part, where))
            except Malformed as error:
                problems.append(Problem(where, f"question {index + 1}: {error}"))
        id, files = json_files(file, part)
        videos.append(Video(id, files, tuple(queries), where))
    return videos


def _query(item: dict[str, Any], part: str, where: str) -> Query:
    asked = fields.clock(item, "time_stamp")
    question, task = fields.text(item, "question"), fields.text(item, "task_type", default=part)
    # The paper counts two tasks of `questions_omni.json` as contextual.
    group = "contextual" if task in CONTEXTUAL else part
    if item.get("ground_truth_time_stamp") is not None:
        truth = fields.clock(item, "ground_truth_time_stamp")
        # Once a second, from the second after the question on.
        polls = tuple(asked + 1 + i for i in range(max(0, math.floor(truth + PATIENCE - asked))))
        if not polls:
            raise Malformed("'ground_truth_time_stamp' is too long before 'time_stamp'")
        output = fields.text(item, "ground_truth_output")
        return Query("proactive", question, output, task=task, group=group, polls=polls, truth_time=truth, where=where)
    four = options(item)
    answer = fields.letter(fields.get(item, "answer"), four)
    return Query("choice", question, answer, four, asked, task=task, group=group, where=where)


def _with_history(videos: list[Video]) -> list[Video]:
    """SQA questions repeat the earlier ones about their video, in the files' order, with their true answers."""
    told: dict[str, list[tuple[str, str]]] = {}
    finished = []
    for video in videos:
        queries = []
        for query in video.queries:
            if query.group == "sqa" and query.kind == "choice" and query.form == "official":
                earlier = told.setdefault(video.files[0], [])
                queries.append(replace(query, history=tuple(earlier)))
                earlier.append((query.text, query.options[ord(query.answer) - ord("A")]))
            else:
                queries.append(query)
        finished.append(replace(video, queries=tuple(queries)))
    return finished


def _files(folder: str, form: str = "") -> str:
    """The four parts, in one of their two forms: both hold the same questions."""
    return "|".join(f"{folder}questions_{part}{form}.json" for part in ("real", "omni", "sqa", "proactive"))


STREAMINGBENCH = Format(
    "streamingbench",
    "StreamingBench",
    parse,
    files=(
        *("|".join(f"{folder}{name}.csv" for name in CSV) for folder in ("", "*/")),
        *(_files(folder) for folder in ("", "*/", "src/data/")),
        *(_files(folder, "_stream") for folder in ("", "*/", "src/data/")),
        "streamingbench*.json",
        "*/streamingbench*.json",
    ),
    averages=(
        Average("real-time, mean of tasks", "tasks", ("real",)),
        Average("real-time, per question", "questions", ("real",)),
        Average("omni-source, mean of tasks", "tasks", ("omni",)),
        Average("real-time and omni-source, per question", "questions", ("real", "omni")),
        Average("contextual, mean of tasks", "tasks", ("contextual", "sqa", "proactive")),
        Average("all, per question", "questions"),
    ),
    fps=1.0,
    prompt=LETTER_ONLY,
    finish=_with_history,
)
