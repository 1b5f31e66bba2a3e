# SPDX-License-Identifier: Apache-2.0
"""VideoMME, EgoSchema, LongVideoBench and CG-Bench: one question an entry, asked at the video's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import conversations, fields
from livevlm.benchmarks.annotations import read_beside
from livevlm.benchmarks.format import Average, Format, ParseEntry, one_query
from livevlm.benchmarks.prompts import LETTER_ONLY
from livevlm.benchmarks.schema import Problem, Query, Video
from livevlm.benchmarks.scoring import first_letter, first_of_five, last_marked, whole_option

PER_QUESTION = (Average("per question", "questions"),)
ROWS = ("test*.jsonl", "*/test*.jsonl", "test*.parquet", "*/test*.parquet")  # as Hugging Face's datasets keep them


Parse = Callable[[dict[str, Any], str, Path], Sequence[Video]]


def _either(parse: Parse) -> ParseEntry:
    """Entries of the benchmark's own form, or of the conversations form."""

    def either(value: Any, where: str, path: Path, problems: list[Problem]) -> Sequence[Video]:
        if conversations.is_conversations(value):
            return [conversations.parse(value, where, problems)]
        return parse(fields.as_object(value), where, path)

    return either


def _videomme(entry: dict[str, Any], where: str, path: Path) -> Sequence[Video]:
    video = fields.text(entry, "videoID")
    options = fields.options(entry, "options")
    query = Query(
        "choice",
        fields.text(entry, "question"),
        fields.letter(fields.get(entry, "answer"), options),
        options,
        task=fields.text(entry, "task_type", default=""),
        group=fields.text(entry, "duration", default=""),
        name=fields.text(entry, "question_id", default=""),
        where=where,
    )
    return one_query(video, (video,), query)


def _egoschema(entry: dict[str, Any], where: str, path: Path) -> Sequence[Video]:
    """A row of lmms-eval's, or of the benchmark's own questions.json, beside which its public answers lie."""
    video = fields.text(entry, "video_idx", "q_uid")
    task = ""
    if "option 0" in entry:
        options = fields.options({"option 0..4": [entry.get(f"option {i}") for i in range(5)]}, "option 0..4")
        public = path.with_name("subset_answers.json")
        answer: Any = fields.as_object(read_beside(public), str(public)).get(video, "") if public.exists() else ""
        task = "subset" if answer != "" else "others"
    else:
        options = fields.options(entry, "option")
        answer = fields.get(entry, "answer", default="")
    gold = "" if answer == "" else fields.letter_at(answer, options, "answer")  # most are not public
    query = Query("choice", fields.text(entry, "question"), gold, options, task=task, name=video, where=where)
    return one_query(video, (video,), query)


def _longvideobench(entry: dict[str, Any], where: str, path: Path) -> Sequence[Video]:
    file = fields.text(entry, "video_path", "video_id")
    if entry.get("candidates") is not None:
        options = fields.options(entry, "candidates")
    else:
        numbered = [entry.get(f"option{i}") for i in range(5)]
        options = fields.options({"option0..4": [text for text in numbered if text not in (None, "N/A")]}, "option0..4")
    query = Query(
        "choice",
        fields.text(entry, "question"),
        fields.letter_at(fields.get(entry, "correct_choice"), options, "correct_choice"),
        options,
        task=fields.text(entry, "question_category", default=""),
        group=fields.text(entry, "duration_group", default=""),
        name=fields.text(entry, "id", default=""),
        where=where,
    )
    files = (file, fields.text(entry, "video_id", default=file))
    return one_query(PurePosixPath(file).stem, files, query, fields.number(entry, "duration", default=None))


def _cgbench(entry: dict[str, Any], where: str, path: Path) -> Sequence[Video]:
    video = fields.text(entry, "video_uid")
    options = fields.options(entry, "choices")
    query = Query(
        "choice",
        fields.text(entry, "question"),
        fields.letter(fields.get(entry, "right_answer"), options),
        options,
        task=fields.text(entry, "sub_category", default=""),
        group=fields.text(entry, "domain", default=""),
        name=fields.text(entry, "qid", default=""),
        windows=fields.windows(entry, "clue_intervals"),
        where=where,
    )
    return one_query(video, (video,), query, fields.number(entry, "duration", default=None))


VIDEOMME = Format(
    "videomme",
    "VideoMME (without subtitles)",
    _either(_videomme),
    files=("videomme*.json*", "*/videomme*.json*", *ROWS),
    averages=PER_QUESTION,
    prompt=LETTER_ONLY,
    choice=first_letter,
)
EGOSCHEMA = Format(
    "egoschema",
    "EgoSchema",
    _either(_egoschema),
    files=(
        "egoschema*.json*",
        "*/egoschema*.json*",
        "Subset/test*.parquet",
        "MC/test*.parquet",
        *ROWS,
        "questions.json",
    ),
    averages=PER_QUESTION,
    folders=("", "videos", "good_clips_git", "data/videos"),
    prompt=LETTER_ONLY,
    choice=whole_option,
)
LONGVIDEOBENCH = Format(
    "longvideobench",
    "LongVideoBench (validation, without subtitles)",
    _either(_longvideobench),
    files=("lvb_val.json", "*/lvb_val.json", *(row.replace("test", "validation") for row in ROWS)),
    averages=PER_QUESTION,
    prompt=LETTER_ONLY,
    choice=first_of_five,
)
CGBENCH = Format(
    "cgbench",
    "CG-Bench",
    _either(_cgbench),
    files=("cgbench_mini.json", "cgbench.json", "cgbench*.json*", "*/cgbench*.json*", *ROWS),
    averages=PER_QUESTION,
    folders=("", "cg_videos_720p", "videos", "video"),
    prompt=LETTER_ONLY,
    choice=last_marked,
)
