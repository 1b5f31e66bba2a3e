# SPDX-License-Identifier: Apache-2.0
"""The form of ReKV and HERMES: an entry a video, with `conversations`; every benchmark here is also read in it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from livevlm.benchmarks import fields
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video


def is_conversations(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" in value


def parse(value: Any, where: str, problems: list[Problem]) -> Video:
    """One entry: `{video_id, video_path, duration, conversations: [{question, answer, choices, end_time, ...}]}`.

    A turn is open if it has no choices, and is asked at the video's end if it has no `end_time`. A turn that cannot be
    used is added to `problems`; the others stay.
    """
    entry = fields.as_object(value)
    if entry.get("clip") is not None:
        raise Malformed("'clip' is not supported: cut the video, and take its start off the times")
    path = fields.text(entry, "video_path", "video_id")
    start = fields.number(entry, "clip_start_time", default=None)
    end = fields.number(entry, "clip_end_time", default=None)
    queries = []
    for index, turn in enumerate(fields.items(entry, "conversations")):
        try:
            queries.append(_query(fields.as_object(turn, "the turn"), entry, where))
        except Malformed as error:
            problems.append(Problem(where, f"turn {index + 1}: {error}"))
    return Video(
        fields.text(entry, "video_id", default=PurePosixPath(path).stem),
        (path,),
        tuple(queries),
        where,
        duration=fields.number(entry, "duration", default=None),
        clip=None if start is None or end is None else (start, end),
        stored_fps=fields.number(entry, "fps", default=None) or None,
    )


def _query(turn: dict[str, Any], entry: dict[str, Any], where: str) -> Query:
    is_choice = any(turn.get(name) is not None for name in ("choices", "options", "candidates"))
    options = fields.options(turn, "choices", "options", "candidates") if is_choice else ()
    task = fields.text({**entry, **turn}, "task", "question_type", "task_type", default="")
    return Query(
        "choice" if is_choice else "open",
        fields.text(turn, "question"),
        _gold(turn, options),
        options,
        fields.number(turn, "end_time", default=None),
        task=task,
        group=fields.text(entry, "duration_category", default=""),
        name=fields.text(turn, "question_id", "qid", default=""),
        windows=fields.windows(turn, "temporal_windows"),
        where=where,
        form="rekv",
    )


def _gold(turn: dict[str, Any], options: tuple[str, ...]) -> str:
    """Null is an answer that is not public, as in EgoSchema's full set."""
    if "answer" in turn and turn["answer"] is None:
        return ""
    return fields.letter_of_text(fields.get(turn, "answer"), options) if options else fields.text(turn, "answer")
