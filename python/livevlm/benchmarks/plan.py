# SPDX-License-Identifier: Apache-2.0
"""What a run is asked to do, and the videos that it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from livevlm.benchmarks.format import Format
from livevlm.benchmarks.locate import Work, gather
from livevlm.benchmarks.prompts import Prompts
from livevlm.benchmarks.schema import Problem, Query
from livevlm.config import Config
from livevlm.errors import ConfigError


class Works(NamedTuple):
    """What there is to do.

    Attributes:
        works: videos to watch.
        problems: what is skipped.
        num_queries: how many questions they will be asked.
        keys: of all questions about all videos that were found, those that are not asked now too.
    """

    works: list[Work]
    problems: list[Problem]
    num_queries: int
    keys: set[str]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        model: the model's name, as answers will carry it.
        config_for: settings for a video of so many frames (None: not known); a budget may be a share of them.
        settings: what `config_for` is made from, as it was asked for.
        videos: folders below which videos lie.
        context: seconds before a question that are shown; None: everything.
        control: whether the newest frames alone, in the same budget, are asked the same.
        limit: most videos; None: all.
        tasks: only these; empty: all.
    """

    form: Format
    model: str
    config_for: Callable[[int | None], Config]
    settings: dict[str, Any]
    files: tuple[Path, ...]
    videos: tuple[Path, ...]
    out: Path
    prompts: Prompts
    max_new_tokens: dict[str, int]
    fps: float
    stored_fps: float = 1.0
    context: float | None = None
    control: bool = True
    limit: int | None = None
    tasks: tuple[str, ...] = ()

    def identity(self, judge: str) -> dict[str, Any]:
        """All that decides an answer. Neither the control, nor how much is run, nor where it lies."""
        return {
            "benchmark": self.form.name,
            "model": self.model,
            "settings": self.settings,
            "fps": self.fps,
            "stored_fps": self.stored_fps,
            "context": self.context,
            "prompts": asdict(self.prompts),
            "max_new_tokens": dict(self.max_new_tokens),
            "judge": judge,
        }

    def works(self) -> Works:
        """Reads the annotation files and looks for their videos; keys do not depend on `tasks` and `limit`.

        Raises:
            ConfigError: no annotation can be used, or no video was found.
        """
        found, problems = self.form.read(self.files)
        tasks = sorted({query.task for video in found for query in video.queries})
        if unknown := set(self.tasks) - set(tasks):
            raise ConfigError(f"--task {min(unknown)!r}: no question is of it; there are {', '.join(map(repr, tasks))}")
        asked = {video.where for video in found if any(map(self.asks, video.queries))}
        if not asked:
            first = f": {problems[0].where}: {problems[0].what}" if problems else ""
            raise ConfigError(f"{', '.join(map(str, self.files))}: no question can be asked{first}")
        everything, missing = gather(found, self.videos, self.form.folders)
        missing = [problem for problem in missing if problem.where in asked]
        works = [work for work in everything if any(map(self.asks, work.queries.values()))]
        if not works:
            raise ConfigError(f"none of the videos was found; the first: {missing[0].where}: {missing[0].what}")
        works = works[: self.limit]
        num_queries = sum(self.asks(query) for work in works for query in work.queries.values())
        return Works(works, problems + missing, num_queries, {key for work in everything for key in work.queries})

    def asks(self, query: Query) -> bool:
        """The questions of other tasks still say where clips are cut, so that answers do not depend on `tasks`."""
        return not self.tasks or query.task in self.tasks
