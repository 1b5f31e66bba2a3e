# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's files are turned into: videos, and questions with the time at which each is asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["choice", "open", "count", "yesno", "proactive"]
Form = Literal["official", "rekv"]
LETTERS = "ABCDEFGHIJKLMN"  # CG-Bench has up to 14 options


class Malformed(Exception):
    """An entry of an annotation file that cannot be used; the message says why."""


class Problem(NamedTuple):
    """Something that was skipped: where it is (file and line, video) and what is wrong with it."""

    where: str
    what: str


@dataclass(frozen=True)
class Query:
    """One question.

    Attributes:
        kind: "choice" among `options`; "open"; "count", answered by a number; "yesno"; "proactive", see `polls`.
        text: the question, without options.
        answer: a letter, a text, a number, or "yes" or "no"; empty if the file has none, then it is not scored.
        ask_time: seconds of video seen when it is asked; None: at the video's end.
        task, group: what it is counted under.
        name: its name in the benchmark, if it has one.
        history: earlier questions with their true answers, which the prompt repeats.
        windows: seconds from and to which the evidence lies, where the benchmark says so.
        polls: times at which a "proactive" question asks whether its moment has come; `answer` is what is to be said
            then, and `truth_time` when.
        form: whose prompt and whose rule of scoring a "choice" has: the benchmark's, or those of ReKV and HERMES.
    """

    kind: Kind
    text: str
    answer: str
    options: tuple[str, ...] = ()
    ask_time: float | None = None
    task: str = ""
    group: str = ""
    name: str = ""
    history: tuple[tuple[str, str], ...] = ()
    windows: tuple[tuple[float, float], ...] = ()
    polls: tuple[float, ...] = ()
    truth_time: float | None = None
    where: str = ""
    form: Form = "official"

    @property
    def times(self) -> tuple[float | None, ...]:
        return self.polls or (self.ask_time,)

    @property
    def needs_judge(self) -> bool:
        return self.kind == "open" and bool(self.answer)

    @property
    def key(self) -> str:
        """Of everything but its place in a file: entries can be added, and one that is mended is asked again."""
        facts = {name: value for name, value in asdict(self).items() if name != "where"}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def facts(self) -> dict[str, Any]:
        """What an answer's line says of its question."""
        return {
            "name": self.name,
            "where": self.where,
            "kind": self.kind,
            "task": self.task,
            "group": self.group,
            "question": self.text,
            "options": list(self.options),
            "expected": self.answer,
            "windows": [list(window) for window in self.windows],
            "truth_time": self.truth_time,
        }


@dataclass(frozen=True)
class Video:
    """A video with its questions.

    Attributes:
        id: its name in the benchmark.
        files: names under which it may lie below the user's folders, likeliest first.
        duration: seconds, if the file says so.
        clip: seconds of the movie from and to which a clip was cut (RVS-Movie).
        stored_fps: frames a second at which a folder of pictures was taken, if the file says so.
    """

    id: str
    files: tuple[str, ...]
    queries: tuple[Query, ...]
    where: str
    duration: float | None = None
    clip: tuple[float, float] | None = None
    stored_fps: float | None = None
