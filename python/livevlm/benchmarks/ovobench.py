# SPDX-License-Identifier: Apache-2.0
"""OVO-Bench: backward, real-time and forward questions, asked at their `realtime`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format
from livevlm.benchmarks.prompts import LETTER_ONLY_ONE_LINE
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video
from livevlm.benchmarks.scoring import letter_inside

GROUPS = {
    "backward": ("EPM", "ASI", "HLD"),
    "real-time": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
GROUP_OF = {task: group for group, tasks in GROUPS.items() for task in tasks}
YES_NO = "Reply only with yes or no."


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    """An entry of `ovo_bench_new.json`, or of the conversations form.

    An entry is looked for as the whole video, then as it was cut for this entry (`id.mp4`, `id_j.mp4`).
    """
    if conversations.is_conversations(value):
        video = conversations.parse(value, where, problems)
        return [replace(video, queries=tuple(_grouped(query, problems) for query in video.queries))]
    entry = fields.as_object(value)
    name, file = str(fields.get(entry, "id")), fields.text(entry, "video")
    task = fields.text(entry, "task")
    if task not in GROUP_OF:
        raise Malformed(f"'task' is {task!r}; allowed: {', '.join(GROUP_OF)}")
    common: dict[str, Any] = {"task": task, "group": GROUP_OF[task], "where": where}
    if GROUP_OF[task] != "forward":
        options = fields.options(entry, "options")
        gold = fields.letter_at(fields.get(entry, "gt"), options, "gt")
        time = math.ceil(fields.number(entry, "realtime"))
        question = fields.text(entry, "question")
        query = Query("choice", question, gold, options, time, name=name, **common)
        return [Video(PurePosixPath(file).stem, _files(file, name), (query,), where)]
    videos = []
    for index, item in enumerate(fields.items(entry, "test_info")):
        try:
            test = fields.as_object(item, "the test")
            query = _forward(entry, test, name=f"{name}_{index}", **common)
            videos.append(Video(PurePosixPath(file).stem, _files(file, query.name), (query,), where))
        except Malformed as error:
            problems.append(Problem(where, f"test_info {index + 1}: {error}"))
    return videos


def _files(file: str, cut: str) -> tuple[str, ...]:
    return file, f"chunked_videos/{cut}.mp4", f"{cut}.mp4"


def _forward(entry: dict[str, Any], test: dict[str, Any], *, task: str, **common: Any) -> Query:
    """One of the times at which REC, SSR or CRR is asked."""
    time = math.ceil(fields.number(test, "realtime"))
    if task == "REC":
        count = fields.number(test, "count")
        if count != int(count):
            raise Malformed(f"'count' is {count!r}, not a whole number")
        text = (
            "People in this video may do the same thing several times. Count how often it has been done so far, by "
            f"anybody; each complete motion is one. How many times did they {fields.text(entry, 'activity')}? "
            "Reply with one number and nothing else."
        )
        return Query("count", text, str(int(count)), ask_time=time, task=task, **common)
    kind = fields.get(test, "type")
    if kind not in (0, 1):
        raise Malformed(f"'type' is {kind!r}; allowed: 0 (no), 1 (yes)")
    if task == "SSR":
        text = (
            f"This video shows the steps of some work. One of them is: {fields.text(test, 'step')}\n"
            f"Is this step being carried out right now? {YES_NO}"
        )
    else:
        text = (
            f"Here is a question about the newest part of the video: {fields.text(entry, 'question')}\n"
            f"Does what has been seen by now, above all the newest frames, suffice to answer it? {YES_NO}"
        )
    return Query("yesno", text, "yes" if kind else "no", ask_time=time, task=task, **common)


def _grouped(query: Query, problems: list[Problem]) -> Query:
    if query.task not in GROUP_OF:
        problems.append(Problem(query.where, f"task {query.task!r} belongs to no group of OVO-Bench"))
    return replace(query, group=GROUP_OF.get(query.task, ""))


OVOBENCH = Format(
    "ovobench",
    "OVO-Bench",
    parse,
    files=("ovo_bench_new.json", "*/ovo_bench_new.json", "ovobench*.json", "*/ovobench*.json"),
    averages=(
        Average("total, mean of the three groups", "groups", tuple(GROUPS)),
        Average("mean of real-time and backward", "groups", ("real-time", "backward")),
        Average("mean of tasks", "tasks"),
        Average("per question", "questions"),
    ),
    folders=("", "src_videos", "videos", "data/src_videos", "data", "data/videos"),
    fps=1.0,
    prompt=LETTER_ONLY_ONE_LINE,
    choice=letter_inside,
    group_over="tasks",
)
