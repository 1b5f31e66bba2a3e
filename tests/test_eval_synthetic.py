# SPDX-License-Identifier: Apache-2.0
"""`livevlm eval synthetic`: one protocol for all memories, intervals that hold, runs that go on."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import livevlm
from livevlm import ConfigError
from livevlm.cli.eval_synthetic import synthetic
from livevlm.evaluating.plan import Plan
from livevlm.evaluating.report import CHANCE_LEVEL
from livevlm.evaluating.run import compare
from livevlm.evaluating.settings import PRESETS, Setting, settings_of
from livevlm.evaluating.statistics import accuracy, difference, t95
from livevlm.evaluating.watching import watch
from livevlm.policies import POLICIES
from livevlm.synthetic import generate

FEW = settings_of(["full", "blind", "random", "similarity"], [25.0], ["none"], ["packed"])


# -------------------------------------------------------------------- statistics
def made_up(num_videos: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asked, and right under two settings, of three kinds: videos differ a lot, and both settings suffer alike."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(1, 6, (num_videos, 3)).astype(float)
    hard = rng.uniform(-0.3, 0.3, (num_videos, 1))
    first = rng.binomial(asked.astype(int), np.clip(0.6 + hard, 0, 1)).astype(float)
    second = np.minimum(asked, first + (rng.random((num_videos, 3)) < 0.3))
    return asked, first, second


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """The truth is the same estimate over very many videos."""
    asked, first, second = made_up(20_000, seed=0)
    truth, gap = accuracy(asked, first).value, difference(asked, second, first).value
    held = [0, 0]
    for seed in range(1, 401):
        asked, first, second = made_up(30, seed)
        one, two = accuracy(asked, first), difference(asked, second, first)
        held[0] += abs(one.value - truth) <= one.half
        held[1] += abs(two.value - gap) <= two.half
    assert all(0.91 <= count / 400 <= 0.98 for count in held), held


def test_intervals_agree_with_a_bootstrap_over_videos() -> None:
    asked, first, second = made_up(60, seed=5)
    rng, values, gaps = np.random.default_rng(0), [], []
    for _ in range(2000):
        drawn = rng.integers(0, 60, 60)
        values.append(accuracy(asked[drawn], first[drawn]).value)
        gaps.append(difference(asked[drawn], second[drawn], first[drawn]).value)
    for estimate, draws in ((accuracy(asked, first), values), (difference(asked, second, first), gaps)):
        assert estimate.half == pytest.approx(1.96 * np.std(draws), rel=0.12)
    unpaired = math.hypot(accuracy(asked, first).half, accuracy(asked, second).half)
    assert difference(asked, second, first).half < 0.6 * unpaired, "what both suffer from is taken out"


def test_simple_cases() -> None:
    asked, right = np.full((4, 2), 2.0), np.array([[2, 1], [2, 1], [0, 1], [0, 1.0]])
    got = accuracy(asked, right)
    assert got.value == 0.5
    # Videos alone have accuracies 0.75, 0.75, 0.25, 0.25: their mean's standard error is that of four numbers.
    assert got.half == pytest.approx(3.182 * np.std([0.75, 0.75, 0.25, 0.25], ddof=1) / 2, rel=0.01)
    assert difference(asked, right, right) == difference(asked, asked, asked)
    assert accuracy(np.array([[2.0, 0.0], [2, 0]]), np.array([[1.0, 0.0], [1, 0]])).value == 0.5, "a kind nobody asked"
    assert math.isnan(accuracy(asked[:1], right[:1]).half)
    assert t95(10) == pytest.approx(2.228, rel=1e-3) and t95(1000) == pytest.approx(1.962, rel=1e-3)


# -------------------------------------------------------------------- protocol
def test_questions_come_at_random_moments_of_the_second_half() -> None:
    plan = Plan(tuple(FEW), frames=(64,), questions=16, moments=4)
    times = [plan.times(64, index) for index in range(50)]
    assert all(len(set(each)) == 4 and each == sorted(each) and each[-1] == 64 for each in times)
    early = torch.tensor([each[:-1] for each in times]).flatten()
    assert early.min() == 32 and early.max() == 63 and 45 < early.double().mean() < 50
    assert times == [plan.times(64, index) for index in range(50)]
    video = plan.video(64, 3)
    asked = plan.questions_of(video, 3)
    assert [question.frame for question in asked] == [frame for frame in plan.times(64, 3) for _ in range(4)]
    assert not torch.equal(video.frames, Plan(tuple(FEW), seed=2).video(64, 3).frames)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_budget_is_kept_at_every_moment(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every clip, and so whenever a question is asked, the memory holds what was seen or the budget, exactly."""
    tiny = livevlm.load("tiny", device="cpu")
    plan = Plan(tuple(FEW), frames=(32,))
    video, held = plan.video(32, 0), []
    questions, ask = plan.questions_of(video, 0), livevlm.Stream.ask

    def asked(self: livevlm.Stream, *args: object, **kwargs: object) -> object:
        stats = self.stats()
        held.append((stats.num_frames, stats.num_video_tokens))
        return ask(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(livevlm.Stream, "ask", asked)
    config = Setting(policy, "none", "packed", 25.0).config(32, 16, clip_frames=8, seed=0)
    result = watch(tiny, config, video.frames, questions)
    assert [frames for frames, _ in held] == [question.frame for question in questions]
    budget = 32 * 16 // 4
    for frames, tokens in [*held, (32, result["tokens"])]:
        expected = frames * 16 if policy == "full" else min(frames * 16, budget)
        assert tokens <= expected if policy == "clip_merge" else tokens == expected
    assert result["seen"] == 512 and result["most_tokens"] <= (512 if policy == "full" else budget)
    assert len(result["answers"]) == 16


def test_settings_that_do_not_exist_and_budgets_that_are_too_small(tmp_path: Path) -> None:
    for names, budgets, retrieval, positions, said in (
        (["fulll"], [25.0], ["none"], ["packed"], "settings 'fulll': allowed are full, blind"),
        (["full"], [0.0], ["none"], ["packed"], "budget 0.0 must be above 0"),
        (["full"], [25.0], ["mean"], ["packed"], "retrieval 'mean': allowed are none"),
        (["full"], [25.0], ["none"], ["there"], "positions 'there': allowed are spread"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings_of(names, budgets, retrieval, positions)
    both = settings_of(["full", "rekv", "streammem"], [50.0, 25.0], ["none", "mean_key"], ["packed", "original"])
    assert len(both) == len(set(both)) == 2 * 2 + 2 + 2, "a preset's own retrieval, positions and budget stay"
    with pytest.raises(ConfigError, match="a quarter of 51 tokens: only the newest 1"):
        Setting("novelty", "mass-25", "packed", 5.0).config(64, 16, clip_frames=8, seed=0)
    with pytest.raises(ConfigError, match="10 tokens do not hold the newest 1 frame"):
        compare(Plan(tuple(settings_of(["recent"], [1.0], ["none"], ["packed"])), frames=(64,)), tmp_path)


@pytest.mark.parametrize("retrieval", ["mass-25", "frame-softmax-25", "mass", "frame"])
def test_shares_that_are_attended_to(retrieval: str) -> None:
    """A quarter of the memory with the newest frame, or 40 % of the blocks beside it."""
    tiny = livevlm.load("tiny", device="cpu")
    (frames,) = (video.frames for video in generate(64, seed=3))
    config = Setting("novelty", retrieval, "packed", 25.0).config(64, 16, clip_frames=8, seed=0)
    stream = livevlm.Stream(tiny.model, tiny.processor, config)
    stream.push(frames)
    memory, search = stream.cache.memory, stream.cache.retrieval
    attended = memory.num_video_tokens - 16 * (search.num_candidates(memory) - search.num_selected(memory))
    assert (memory.num_video_tokens, attended) == (256, 64 if retrieval.endswith("-25") else 16 + 6 * 16)


# -------------------------------------------------------------------- runs
def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("ms_")} for row in rows]


def stop_after(count: int) -> Callable[[int, int], None]:
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > count:
            raise KeyboardInterrupt

    return progress


def test_a_run_that_was_stopped_goes_on_and_processes_change_nothing(tmp_path: Path) -> None:
    plan = Plan(tuple(FEW), frames=(32,), streams=3, questions=8)
    compare(plan, tmp_path / "whole", plots=False)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, tmp_path / "stopped", plots=False, progress=stop_after(5))
    lines = tmp_path / "stopped" / "streams.jsonl"
    done = lines.read_text()
    assert done.count("\n") == 5
    lines.write_text(done + '{"key": [32, 1, "ran')  # and in the middle of a line
    seen: list[tuple[int, int]] = []
    compare(
        plan, tmp_path / "stopped", processes=2, plots=False, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0] == (5 * 32, 12 * 32) and seen[-1] == (12 * 32, 12 * 32) and len(seen) == 1 + 7
    assert lines.read_text().startswith(done), "what was there was not run again"
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"another run: questions=8, now 16; give another --out"):
        compare(Plan(tuple(FEW), frames=(32,), streams=3), tmp_path / "stopped", plots=False)


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    """No `full` to compare with, and of a single question only one kind: strict readers take the files all the same."""
    plan = Plan(
        tuple(settings_of(["recent"], [25.0], ["none"], ["packed"])), frames=(32,), streams=1, questions=1, moments=1
    )
    compare(plan, tmp_path, plots=False)
    text = (tmp_path / "results.json").read_text()
    (row,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))["rows"]
    assert row["to_full"] is None and sorted(value is None for value in row["kinds"].values()) == [False] + 7 * [True]
    assert "nan" not in (tmp_path / "results.csv").read_text()


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """There is work for hours: who does not notice goes on with it, unheard."""
    options = f"--streams 9999 --settings full --processes 2 --device cpu --no-plots --out {tmp_path}"
    code = "import sys; from livevlm.cli.eval_synthetic import synthetic; synthetic(sys.argv[1:])"
    lines, deadline = tmp_path / "streams.jsonl", time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", code, *options.split()], start_new_session=True) as run:
        while not (lines.exists() and lines.stat().st_size):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run.kill()
    try:
        while time.monotonic() < deadline:
            os.killpg(run.pid, 0)  # raises when the last of them is gone
            time.sleep(0.1)
    except ProcessLookupError:
        return
    os.killpg(run.pid, signal.SIGKILL)
    pytest.fail("processes were still at work")


def test_every_preset_runs_and_files_say_what_came_of_it(tmp_path: Path) -> None:
    options = f"--streams 2 --frames 32 --budgets 25,2 --device cpu --out {tmp_path}"
    done = CliRunner().invoke(synthetic, options.split())
    assert done.exit_code == 0, done.output
    assert "left out: 32 frames, 2 %: recent: 10 tokens do not hold the newest 1 frame(s)" in " ".join(
        done.stderr.split()
    )
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["setting"]: row for row in found["rows"]}
    assert list(rows) == list(PRESETS)
    assert all(row["streams"] == 2 and row["questions"] == 16 and row["tokens_seen"] == 512 for row in found["rows"])
    assert rows["full"]["accuracy"] > 0.9 and rows["full"]["to_full"] == 0 and rows["full"]["to_full_ci95"] == 0
    assert rows["blind"]["tokens"] == 16 and rows["blind"]["accuracy"] < 0.7
    assert rows["blind"]["kinds"]["now_shape"] == rows["blind"]["kinds"]["now_colour"] == 1
    assert rows["rekv"]["tokens"] == 512 and rows["random"]["tokens"] == 128
    assert rows["random"]["bytes"] == (128 + 2) * 6 * 2 * 2 * 64 * 4
    assert rows["recent"]["to_full"] == pytest.approx(rows["recent"]["accuracy"] - rows["full"]["accuracy"])
    assert 0.1 < CHANCE_LEVEL < 0.2
    text = (tmp_path / "results.md").read_text()
    assert text in done.stdout and "| similarity |" in text
    for name in ("results.csv", "accuracy-32-frames.png", "accuracy-32-frames.svg"):
        assert (tmp_path / name).stat().st_size > 1000
