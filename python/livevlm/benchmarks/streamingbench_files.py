# SPDX-License-Identifier: Apache-2.0
"""StreamingBench's files: five tables (Hugging Face) or four JSON files (the repository), and where videos lie."""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath
from typing import Any

from livevlm.benchmarks import fields
from livevlm.benchmarks.schema import Malformed

CSV = (
    "Real_Time_Visual_Understanding",
    "Omni_Source_Understanding",
    "Contextual_Understanding",
    "Sequential_Question_Answering",
    "Proactive_Output",
)
PARTS = {  # by the words that begin a file's name, or follow an underscore in it
    "real": "real",
    "omni": "omni",
    "contextual": "contextual",
    "sqa": "sqa|sequential",
    "proactive": "proactive",
}
KINDS = {
    "real": "Real-Time Visual Understanding",
    "sqa": "Sequential Question Answering",
    "proactive": "Proactive Output",
}
LETTERED = re.compile(r"([A-D])[.)]\s*")


def part_of(path: Path) -> str:
    """Which of the benchmark's parts a file holds."""
    stem = path.stem.lower()
    return next((part for part, words in PARTS.items() if re.search(rf"(^|_)({words})", stem)), "real")


def sample_of(question_id: str, part: str) -> tuple[str, str, str]:
    """The id itself, task and sample of an id such as "Real-Time Visual Understanding_sample_1_2".

    A part that is one task has one name here: the proactive one's is now "Proactive", now "Active Output".
    """
    match = re.fullmatch(r"(.+)_(sample_\d+)_\d+", question_id)
    if match is None:
        raise Malformed(f"'question_id' is {question_id!r}, not of the form TASK_sample_NUMBER_NUMBER")
    return question_id, KINDS.get(part, match[1]), match[2]


def place(part: str, kind: str, sample: str) -> tuple[str, ...]:
    """Where a sample's video may lie: as the archives unpack in a folder of their name or of their part, or renamed."""
    own = () if part in ("omni", "contextual") else (f"{part}/{sample}/video.mp4",)  # the others hold several kinds
    short = part if own else kind.replace(" ", "_")
    return f"{kind}/{sample}/video.mp4", *own, f"{sample}_{short}.mp4"


def json_files(file: str, part: str) -> tuple[str, tuple[str, ...]]:
    """Name and places of the video that a JSON file names, by its path or as "sample_1_real.mp4"."""
    path = PurePosixPath(file)
    renamed = re.fullmatch(r"(sample_\d+)_(.+)", path.stem)
    if renamed is not None:
        kind = KINDS.get(renamed[2], renamed[2].replace("_", " "))
        return path.stem, (file, *place(part, kind, renamed[1]))
    return (f"{path.parent.parent.name}_{path.parent.name}".strip("_") if path.stem == "video" else path.stem), (file,)


def options(item: dict[str, Any]) -> tuple[str, ...]:
    """Options without their letters. A few entries break an option in two, repeat the list, or letter some only."""
    given = fields.get(item, "options")
    if isinstance(given, str):  # in a table, a list as Python writes it
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            raise Malformed(f"'options' is {given!r}, not a list") from None
    texts = [str(text).strip() for text in fields.items({"options": given}, "options")]
    if len(texts) > 4 and LETTERED.match(texts[0]):
        whole: dict[str, str] = {}
        for text in texts:
            match = LETTERED.match(text)
            if match is None:
                whole[next(reversed(whole))] += f" {text}"
            elif match[1] in whole:
                break
            else:
                whole[match[1]] = text
        texts = list(whole.values())
    if re.match(r"A[.)]", texts[0]):
        texts = [text[match.end() :] if (match := LETTERED.match(text)) else text for text in texts]
    return fields.options({"options": texts}, "options")
