# SPDX-License-Identifier: Apache-2.0
"""A benchmark from its files to its answers: this process's share of the videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import livevlm
from livevlm.benchmarks.asking import Asker
from livevlm.benchmarks.format import Format
from livevlm.benchmarks.frames import opened
from livevlm.benchmarks.identity import SEED, claim, config_hash, git_hash
from livevlm.benchmarks.judge import Judge
from livevlm.benchmarks.locate import Work, gather
from livevlm.benchmarks.prompts import Prompt
from livevlm.benchmarks.results import AnswerFile
from livevlm.benchmarks.schema import Problem, Query
from livevlm.benchmarks.shards import Shard
from livevlm.benchmarks.viewer import CONTROL, METHOD, NewStream, Viewer, control_config, free_streams
from livevlm.benchmarks.watch import Pass
from livevlm.checkpoint import Checkpoint
from livevlm.config import Config
from livevlm.errors import ConfigError, FrameError, VideoError
from livevlm.models import adapter_for
from livevlm.staging import Staging
from livevlm.stream import Stream


class Progress(Protocol):
    """Told how far the run is; see `livevlm.cli.eval`."""

    def video(self, name: str, num_frames: int | None) -> None: ...
    def frames(self, count: int) -> None: ...
    def problem(self, problem: Problem) -> None: ...
    def watched(self) -> None: ...


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
    prompt: Prompt
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
            "prompt": asdict(self.prompt),
            "max_new_tokens": dict(self.max_new_tokens),
            "judge": judge,
        }

    def works(self) -> tuple[list[Work], list[Problem], int]:
        """Videos to watch, what is skipped, and how many questions there are.

        Raises:
            ConfigError: no annotation can be used, or no video was found.
        """
        found, problems = self.form.read(self.files)
        found = [video for video in found if any(map(self.asks, video.queries))]
        if not found:
            first = f": {problems[0].where}: {problems[0].what}" if problems else ""
            raise ConfigError(f"{', '.join(map(str, self.files))}: no question can be asked{first}")
        works, missing = gather(found, self.videos, self.form.folders)
        if not works:
            raise ConfigError(f"none of the videos was found; the first: {missing[0].where}: {missing[0].what}")
        works = works[: self.limit]
        return works, problems + missing, sum(self.asks(query) for work in works for query in work.queries.values())

    def asks(self, query: Query) -> bool:
        """The questions of other tasks still say where clips are cut, so that answers do not depend on `tasks`."""
        return not self.tasks or query.task in self.tasks


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    judge: Judge | None,
    shard: Shard,
    progress: Progress,
    *,
    new_stream: NewStream | None = None,
) -> bool:
    """Answers what has not been answered yet; True if all processes are through.

    Args:
        new_stream: makes a stream of some configuration; of `checkpoint` if None.

    Raises:
        ConfigError: the folder holds answers of another run, or nothing can be asked.
        JudgeError: the judge cannot be reached; answers so far are kept.
    """
    works, problems, num_queries = plan.works()
    problems = problems if shard.rank == 0 else []  # all processes read all annotations
    for problem in problems:
        progress.problem(problem)
    judge_name = "none" if judge is None else judge.name
    identity = plan.identity(judge_name)
    claim(plan.out, identity)
    torch.manual_seed(SEED)
    make = new_stream or (lambda config: Stream(checkpoint.model, checkpoint.processor, config))
    shard.begin(plan.out)
    with AnswerFile(plan.out, shard.rank, shard.world, config_hash(identity)) as answers:
        done = answers.done()
        common = {
            "model": plan.model,
            "config_hash": config_hash(identity),
            "judge": judge_name,
            "livevlm": livevlm.__version__,
            "git": git_hash(),
            "seed": SEED,
            **_device(checkpoint),
        }
        runner = _Runner(plan, checkpoint, judge, answers, make, common, progress, problems)
        for work in works[shard.rank :: shard.world]:
            runner.watch(work, done)
            progress.watched()
        return shard.end(plan.out, {"num_queries": num_queries}, problems)


@dataclass
class _Runner:
    plan: Plan
    checkpoint: Checkpoint
    judge: Judge | None
    answers: AnswerFile
    make: NewStream
    common: dict[str, Any]
    progress: Progress
    problems: list[Problem]

    def watch(self, work: Work, done: set[tuple[str, str]]) -> None:
        """One video; whatever is wrong with it is noted, and the run goes on."""
        plan = self.plan
        try:
            with opened(work.path, work.video, fps=plan.fps, stored_fps=plan.stored_fps) as source:
                config = plan.config_for(source.num_frames)
                configs = {METHOD: config}
                if plan.control and config.policy != "recent":
                    configs[CONTROL] = control_config(config)
                asked = [key for key, query in work.queries.items() if plan.asks(query)]
                wanted = {(role, key) for role in configs for key in asked} - done
                if not wanted:
                    return
                self.progress.video(work.id, source.num_frames)
                asker = Asker(plan.prompt, plan.max_new_tokens, plan.form.choice)
                one = Pass(
                    [Viewer(role, configs[role], self.make, plan.context) for role in _roles(wanted, configs)],
                    work.queries,
                    wanted,
                    asker,
                    plan.fps,
                    config.clip_frames,
                    tell=lambda role, key, facts: self._keep(work, role, configs[role], key, facts),
                    refuse=lambda key, why: self._skip(work.queries[key].where, why),
                    progress=self.progress.frames,
                )
                adapter = adapter_for(self.checkpoint.model)
                one.run(source, Staging(self.checkpoint.processor, adapter.image_size, adapter.device))
        except (VideoError, FrameError) as error:
            self._skip(work.video.where, f"video {work.id}: {error}")
        finally:
            free_streams()

    def _skip(self, where: str, why: str) -> None:
        problem = Problem(where, why)
        self.problems.append(problem)
        self.progress.problem(problem)

    def _keep(self, work: Work, role: str, config: Config, key: str, facts: dict[str, Any]) -> None:
        query = work.queries[key]
        line: dict[str, Any] = {
            "benchmark": self.plan.form.name,
            "role": role,
            "policy": config.policy,
            "budget": None if config.policy == "full" else config.max_memory or config.budget,
            "video": work.id,
            "query": key,
            **_facts(query),
            **facts,
            "judged": None,
            "judge_score": None,
            **self.common,
        }
        if self.judge is not None and query.kind == "open" and query.answer:
            verdict = self.judge(query.text, query.answer, facts["reply"])
            line |= {"judged": verdict.right, "judge_score": verdict.score, "judge_reply": verdict.reply}
        self.answers.append(line)


def _roles(wanted: set[tuple[str, str]], configs: dict[str, Config]) -> list[str]:
    """Only who has something to answer watches."""
    return [role for role in configs if any(role == one for one, _ in wanted)]


def _facts(query: Query) -> dict[str, Any]:
    return {
        "name": query.name,
        "kind": query.kind,
        "task": query.task,
        "group": query.group,
        "question": query.text,
        "options": list(query.options),
        "expected": query.answer,
        "windows": [list(window) for window in query.windows],
        "truth_time": query.truth_time,
    }


def _device(checkpoint: Checkpoint) -> dict[str, str]:
    weight = next(checkpoint.model.parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return {"device": name, "dtype": str(weight.dtype).removeprefix("torch."), "torch": torch.__version__}


__all__: Sequence[str] = ["Plan", "Progress", "run"]
