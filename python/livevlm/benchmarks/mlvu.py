# SPDX-License-Identifier: Apache-2.0
"""MLVU, the development set's multiple-choice tasks; questions at the video's end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format, one_query
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video
from livevlm.benchmarks.scoring import before_bracket


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    """An entry of the seven task files (`1_plotQA.json` ...), of lmms-eval's rows, or of ReKV's `dev_debug_mc.json`."""
    if conversations.is_conversations(value):
        return [conversations.parse(value, where, problems)]
    entry = fields.as_object(value)
    question = fields.text(entry, "question")
    if "video_name" in entry:  # lmms-eval
        file = fields.text(entry, "video_name")
        question, options = _divided(question)
        answer = fields.letter(fields.get(entry, "answer"), options)
        task = fields.text(entry, "task_type")
    else:
        file = fields.text(entry, "video")
        options = fields.options(entry, "candidates")
        answer = fields.letter_of_text(fields.get(entry, "answer"), options)
        task = fields.text(entry, "question_type", default=path.stem)
    query = Query("choice", question, answer, options, task=task, where=where)
    # The official archive has a folder of videos for each task, with the task file's name.
    files = (file, f"{path.stem}/{file}")
    return one_query(PurePosixPath(file).stem, files, query, fields.number(entry, "duration", default=None))


def _divided(question: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of a text that holds both, an option a line: "(A) text"."""
    first, *options = re.split(r"\n\s*(?=\(?[A-N][.)])", question)
    if len(options) < 2:
        raise Malformed("'question' holds no lines of options, such as (A) text")
    return first.strip(), fields.options({"question": options}, "question")


MLVU = Format(
    "mlvu",
    "MLVU (dev, multiple choice)",
    parse,
    files=(  # 8 and 9 are tasks of writing, which have no options
        *(f"{folder}[1-7]_*.json" for folder in ("", "json/", "*/json/")),
        *(f"{folder}dev_debug_mc.json" for folder in ("", "*/")),
        *(f"{folder}test*.{kind}" for kind in ("jsonl", "parquet") for folder in ("", "*/")),
    ),
    choice=before_bracket,
    averages=(
        Average("M-Avg (mean of tasks)", "tasks"),
        Average("per question", "questions"),
    ),
)
