# SPDX-License-Identifier: Apache-2.0
"""From the options of `livevlm eval BENCHMARK` to a run, with its progress on stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from livevlm.benchmarks.judge import JudgeChoice
from livevlm.benchmarks.plan import Plan
from livevlm.benchmarks.prompts import Prompts
from livevlm.benchmarks.registry import FORMATS
from livevlm.benchmarks.run import run
from livevlm.benchmarks.schema import Problem
from livevlm.benchmarks.shards import Shard
from livevlm.benchmarks.summary import summarize
from livevlm.checkpoint import Checkpoint
from livevlm.cli.values import budget_settings
from livevlm.cli.watch import load_quietly
from livevlm.config import Config
from livevlm.errors import ConfigError
from livevlm.models import adapter_for


def evaluate_benchmark(
    benchmark: str,
    *,
    data: Path,
    out: Path,
    annotations: tuple[Path, ...],
    videos: tuple[Path, ...],
    name: str,
    policy: str | None,
    budget: str | None,
    retrieval: str | None,
    changes: tuple[str, ...],
    fps: float | None,
    stored_fps: float,
    context: float | None,
    control: bool,
    template: str | None,
    prefix: str | None,
    max_new_tokens: int | None,
    judge_url: str | None,
    judge_model: str | None,
    judge_key: str,
    tasks: tuple[str, ...],
    limit: int | None,
    device: str,
) -> None:
    form, shard = FORMATS[benchmark], Shard.from_environment()
    choice = JudgeChoice(judge_url, judge_model, judge_key).checked()
    files = annotations or tuple(form.annotation_files(data))
    if template is not None and "{question}" not in template:
        raise ConfigError(f"--template {template!r} must hold {{question}}")
    prompts = Prompts(form.prompt).changed(template, prefix)
    longest = {kind: max_new_tokens or count for kind, count in form.max_new_tokens.items()}
    checkpoint = load_quietly(name, _device_of(device, shard))
    overrides = {"policy": policy, "retrieval": retrieval}
    asked = {key: value for key, value in overrides.items() if value is not None} | settings_of(changes)
    asked |= {"max_new_tokens": max(longest.values())}
    budgets = Budgets(checkpoint, asked, budget)
    plan = Plan(
        form,
        name,
        budgets.config_for,
        budgets.settings,
        files,
        (*videos, data),
        out,
        prompts,
        longest,
        fps=fps or form.fps,
        stored_fps=stored_fps,
        context=context,
        control=control,
        limit=limit,
        tasks=tasks,
    )
    judge = choice.load(adapter_for(checkpoint.model).device)
    with showing(shard) as progress:
        if shard.rank == 0:
            progress.note(f"reading {', '.join(map(str, files))}")
        all_through = run(plan, checkpoint, judge, shard, progress)
    if all_through:
        _, written = summarize(out)
        click.echo((out / "summary.md").read_text(), nl=False)
        click.echo("\n".join(f"wrote {path}" for path in written), err=True)


def settings_of(changes: Iterable[str]) -> dict[str, Any]:
    """ "NAME=VALUE" as settings; a value is JSON, or else a text."""
    found: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(Config)} - {"policy", "budget", "max_memory", "retrieval"}
    for change in changes:
        key, mark, value = change.partition("=")
        if not mark or key not in known:
            raise ConfigError(f"--set {change!r}: allowed are NAME=VALUE with NAME one of {', '.join(sorted(known))}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


class Budgets:
    """Settings for each video: a budget may be a share of its tokens."""

    def __init__(self, checkpoint: Checkpoint, asked: dict[str, Any], budget: str | None) -> None:
        self.budget, self.tokens_per_frame = budget, adapter_for(checkpoint.model).tokens_per_frame
        # A file is in no hurry: not a token more than the budget, whatever the sizes of clips.
        self.base = dataclasses.replace(checkpoint.config, **{"slack": 0.0, **asked})
        if budget is not None and self.base.policy == "full":
            raise ConfigError("policy 'full' keeps everything: give it no --budget")
        self.is_share = budget is not None and budget.strip().endswith("%")
        if budget is not None:
            resolved = budget_settings(budget, 10**9 if self.is_share else None)
            if not self.is_share:
                self.base = dataclasses.replace(self.base, **resolved)
        self.settings = {**asdict(self.base), **({"budget": budget} if self.is_share else {})}

    def config_for(self, num_frames: int | None) -> Config:
        if not self.is_share:
            return self.base
        assert self.budget is not None
        tokens = None if num_frames is None else num_frames * self.tokens_per_frame
        resolved = budget_settings(self.budget, tokens)
        least = (self.base.recent_frames + 1) * self.tokens_per_frame  # a short video's share may hold no frame
        return dataclasses.replace(self.base, **{**resolved, "budget": max(least, resolved["budget"])})


def _device_of(device: str, shard: Shard) -> str:
    """Each process its own GPU."""
    if device == "auto" and shard.world > 1 and torch.cuda.is_available():
        return f"cuda:{shard.local_rank % torch.cuda.device_count()}"
    return device


class _Shown:
    def __init__(self, bars: Bars, console: Console) -> None:
        self.bars, self.console = bars, console
        self.task = bars.add_task("", total=None, visible=False)
        self.count = 0

    def video(self, name: str, num_frames: int | None) -> None:
        self.bars.reset(self.task, total=num_frames, description=f"{name} ({self.count} videos done)", visible=True)

    def frames(self, count: int) -> None:
        self.bars.advance(self.task, count)

    def watched(self) -> None:
        self.count += 1

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def problem(self, problem: Problem) -> None:
        self.note(f"skipped: {problem.where}: {problem.what}")


@contextmanager
def showing(shard: Shard) -> Iterator[_Shown]:
    """A bar of the video being watched, and a line for whatever is skipped."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or shard.rank != 0
    with Bars(*columns, console=console, transient=True, disable=hidden) as bars:
        yield _Shown(bars, console)
