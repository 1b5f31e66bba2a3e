# SPDX-License-Identifier: Apache-2.0
"""RVS-Ego and RVS-Movie: open questions in streams, asked at their `end_time`; a judge decides.

Read in the form of ReKV and HERMES, an entry a video, and in that of VStream-QA, an entry a question, whose times count
from the start of the video that a clip was cut from; a second file beside it says where clips begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.annotations import read_beside
from livevlm.benchmarks.format import Average, Format
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video


def parse(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
    if not conversations.is_conversations(value):
        return [_vstream(fields.as_object(value), where, path)]
    video = conversations.parse(value, where, problems)
    kept = []
    group = "movie" if video.clip is not None or "movie" in path.stem else "ego"
    for index, query in enumerate(video.queries):
        if query.ask_time is None:
            problems.append(Problem(where, f"turn {index + 1}: 'end_time' is missing"))
        else:
            kept.append(replace(query, task=query.task or f"RVS-{group.capitalize()}", group=group))
    return [replace(video, queries=tuple(kept))]


CLIPS = {"test_qa_ego4d.json": "rvs_ego.json", "test_qa_movienet.json": "rvs_movie.json"}


def _vstream(entry: dict[str, Any], where: str, path: Path) -> Video:
    """Of VStream-QA's own files; its frames are folders of pictures, one a second."""
    if path.name not in CLIPS:
        raise Malformed(f"'conversations' is missing; VStream-QA's own files are {' and '.join(CLIPS)}")
    video = fields.text(entry, "video_id")
    clips = path.with_name(CLIPS[path.name])
    entries = fields.items({clips.name: read_beside(clips)}, clips.name)
    found = [clip for clip in entries if isinstance(clip, dict) and str(clip.get("video_id")) == video]
    if not found:
        raise Malformed(f"video {video!r} is not in {clips}, which says where it begins")
    start, end = fields.number(found[0], "start_time"), fields.number(found[0], "end_time")
    asked = fields.number(entry, "end_time")
    if not start <= asked <= end:
        raise Malformed(f"'end_time' is {asked}, not within its clip, from {start} to {end}")
    group = "movie" if "movie" in path.stem else "ego"
    query = Query(
        "open",
        fields.text(entry, "question"),
        fields.text(entry, "answer"),
        ask_time=asked - start,
        task=fields.text(entry, "answer_type", default=f"RVS-{group.capitalize()}"),
        group=group,
        name=fields.text(entry, "id", default=""),
        where=where,
    )
    return Video(video, (video,), (query,), where, duration=end - start, stored_fps=1.0)


RVS = Format(
    "rvs",
    "RVS-Ego and RVS-Movie",
    parse,
    files=(
        "*_oe.json",
        "*/*_oe.json",
        "test_qa_ego4d.json|test_qa_movienet.json",
        "*/test_qa_ego4d.json|*/test_qa_movienet.json",
    ),
    averages=(Average("per question", "questions"),),
    folders=(
        *("", "videos", "ego/videos", "movie/videos", "ego", "movie"),
        *(f"{folder}{name}_frames" for folder in ("", "vstream-realtime/") for name in ("ego4d", "movienet")),
    ),
)
