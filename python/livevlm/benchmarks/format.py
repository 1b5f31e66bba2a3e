# SPDX-License-Identifier: Apache-2.0
"""What makes one benchmark differ from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from livevlm.benchmarks.annotations import Entry, read_entries
from livevlm.benchmarks.prompts import BEST_OPTION, Prompt
from livevlm.benchmarks.schema import Malformed, Problem, Query, Video
from livevlm.benchmarks.scoring import Official, first_character
from livevlm.errors import ConfigError

ParseEntry = Callable[[Any, str, Path, list[Problem]], Sequence[Video]]


@dataclass(frozen=True)
class Average:
    """A figure that papers report.

    Attributes:
        over: mean over all questions, over the accuracies of tasks, or over those of groups.
        groups: only these; all of them must have answers. Empty: whatever there is.
    """

    label: str
    over: Literal["questions", "tasks", "groups"]
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A benchmark.

    Attributes:
        parse: entry, where it is, its file, list of problems to add to -> videos with questions.
        files: patterns of annotation files below the data folder; the first one that finds any is taken. "|" divides
            patterns that belong together.
        folders: where below the data folder videos may lie.
        fps: frames a second that the field looks at.
        choice: the benchmark's own rule for multiple choice.
        group_over: whether a group's accuracy is the mean of its questions or of its tasks.
        finish: the videos of all files -> the same, where questions depend on others'.
    """

    name: str
    title: str
    parse: ParseEntry
    files: tuple[str, ...]
    averages: tuple[Average, ...]
    folders: tuple[str, ...] = ("", "videos", "video", "data", "data/videos")
    fps: float = 0.5
    prompt: Prompt = BEST_OPTION
    choice: Official = first_character
    group_over: Literal["questions", "tasks"] = "questions"
    finish: Callable[[list[Video]], list[Video]] = lambda videos: videos
    max_new_tokens: Mapping[str, int] = field(
        default_factory=lambda: {"choice": 16, "count": 16, "yesno": 16, "open": 256, "proactive": 64}
    )

    def annotation_files(self, data: Path) -> list[Path]:
        """Raises ConfigError if there are none."""
        for pattern in self.files:
            found = sorted(path for part in pattern.split("|") for path in data.glob(part) if path.is_file())
            if found:
                return found
        names = ", ".join(self.files).replace("|", ", ")
        raise ConfigError(f"{data}: no annotation file of {self.title} is there ({names}); name it")

    def read(self, files: Sequence[Path]) -> tuple[list[Video], list[Problem]]:
        """All videos that could be understood, and what could not."""
        videos: list[Video] = []
        problems: list[Problem] = []
        for path in files:
            for entry in read_entries(path):
                if isinstance(entry, Problem):
                    problems.append(entry)
                    continue
                try:
                    videos += self._parsed(entry, path, problems)
                except Malformed as error:
                    problems.append(Problem(entry.where, str(error)))
        return self.finish(videos), problems

    def _parsed(self, entry: Entry, path: Path, problems: list[Problem]) -> Sequence[Video]:
        return self.parse(entry.value, entry.where, path, problems)


def one_query(video: str, files: tuple[str, ...], query: Query, duration: float | None = None) -> list[Video]:
    """An entry that is one question about a video."""
    return [Video(video, files, (query,), query.where, duration)]
