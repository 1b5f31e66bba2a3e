# SPDX-License-Identifier: Apache-2.0
"""MLVU, the development set's multiple-choice tasks; questions at the video's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.format import Average, Format, one_query
from livevlm.benchmarks.schema import Problem, Query, Video


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    """An entry of the seven task files (`1_plotQA.json` ...), or of ReKV's `dev_debug_mc.json`."""
    if conversations.is_conversations(value):
        return [conversations.parse(value, where, problems)]
    entry = fields.as_object(value)
    file = fields.text(entry, "video", "video_path", "video_name")
    options = fields.options(entry, "candidates", "choices", "options")
    query = Query(
        "choice",
        fields.text(entry, "question"),
        fields.letter_of(fields.get(entry, "answer"), options),
        options,
        task=fields.text(entry, "question_type", "task_type", default=path.stem),
        where=where,
    )
    # The official archive has a folder of videos for each task, with the task file's name.
    files = (file, f"{path.stem}/{file}")
    return one_query(PurePosixPath(file).stem, files, query, fields.number(entry, "duration", default=None))


MLVU = Format(
    "mlvu",
    "MLVU (dev, multiple choice)",
    parse,
    files=("[1-9]_*.json", "json/[1-9]_*.json", "*/json/[1-9]_*.json", "dev_debug_mc.json", "*/dev_debug_mc.json"),
    averages=(
        Average("M-Avg (mean of tasks)", "tasks"),
        Average("per question", "questions"),
    ),
)
