# SPDX-License-Identifier: Apache-2.0
"""A benchmark from its files to its answers: this process's share of the videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

import livevlm
from livevlm.benchmarks.asking import Asker
from livevlm.benchmarks.frames import opened
from livevlm.benchmarks.identity import SEED, claim, config_hash, device_of, git_hash
from livevlm.benchmarks.judge import Judge, check
from livevlm.benchmarks.locate import Work
from livevlm.benchmarks.plan import Plan
from livevlm.benchmarks.results import AnswerFile, outdated, read_all
from livevlm.benchmarks.schema import Problem
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
        JudgeError: the judge cannot be reached, or does not judge; answers so far are kept.
    """
    works, problems, num_queries, keys = plan.works()
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
        found = read_all(plan.out)
        done = {(answer["role"], answer["query"]) for answer in found}
        common = {
            "model": plan.model,
            "config_hash": config_hash(identity),
            "judge": judge_name,
            "judge_place": None if judge is None else judge.place,
            "livevlm": livevlm.__version__,
            "git": git_hash(),
            "seed": SEED,
            **device_of(checkpoint.model),
        }
        mine = works[shard.rank :: shard.world]
        if judge is not None and any(
            query.needs_judge and plan.asks(query) and (METHOD, key) not in done
            for work in mine
            for key, query in work.queries.items()
        ):
            check(judge)
        runner = _Runner(plan, checkpoint, judge, answers, make, common, progress, problems)
        for work in mine:
            runner.watch(work, done)
            progress.watched()
        facts = {"num_queries": num_queries, "outdated": outdated(found, keys, plan.files)}
        return shard.end(plan.out, facts, problems)


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
        asked = [key for key, query in work.queries.items() if plan.asks(query)]
        wanted = {(METHOD, key) for key in asked} - done
        try:
            with opened(work.path, work.video, fps=plan.fps, stored_fps=plan.stored_fps) as source:
                config = self._config(source.num_frames)
                configs = {METHOD: config}
                if plan.control and control_config(config) != config:
                    configs[CONTROL] = control_config(config)
                wanted = {(role, key) for role in configs for key in asked} - done
                if not wanted:
                    return
                self.progress.video(work.id, source.num_frames)
                asker = Asker(plan.prompts, plan.max_new_tokens, plan.form.choice)
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
            if left := len({key for _, key in wanted}):
                unanswered = f"{left} question{'s' * (left > 1)} unanswered"
                self._skip(work.video.where, f"video {work.id}: {error} ({unanswered})")
        finally:
            free_streams()

    def _config(self, num_frames: int | None) -> Config:
        try:
            return self.plan.config_for(num_frames)
        except ConfigError as error:  # a share of a length that this one file does not tell
            raise VideoError(str(error)) from None

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
            **query.facts(),
            **facts,
            "judged": None,
            "judge_score": None,
            **self.common,
        }
        if self.judge is not None and query.needs_judge:
            verdict = self.judge(query.text, query.answer, facts["reply"])
            line |= {"judged": verdict.right, "judge_score": verdict.score, "judge_reply": verdict.reply}
        self.answers.append(line)


def _roles(wanted: set[tuple[str, str]], configs: dict[str, Config]) -> list[str]:
    """Only who has something to answer watches."""
    return [role for role in configs if any(role == one for one, _ in wanted)]
