# SPDX-License-Identifier: Apache-2.0
"""Miniature data sets in the benchmarks' own forms, about generated videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from click.testing import CliRunner, Result

import livevlm
from livevlm import Answer, Evidence
from livevlm.benchmarks.judge import Judge
from livevlm.benchmarks.plan import Plan
from livevlm.benchmarks.prompts import Prompts
from livevlm.benchmarks.registry import FORMATS
from livevlm.benchmarks.run import run as evaluate
from livevlm.benchmarks.schema import Problem
from livevlm.benchmarks.shards import Shard
from livevlm.benchmarks.summary import summarize
from livevlm.cli import main
from livevlm.synthetic import ANSWERS, Question, SyntheticVideo, generate
from livevlm.video import import_cv2

FULL = ("--policy", "full", "--template", "{question}", "--device", "cpu")


def videos(count: int, num_frames: int = 24, seed: int = 5) -> list[SyntheticVideo]:
    return generate(num_frames, seed=seed, num_videos=count)


def write_mp4(path: Path, video: SyntheticVideo, fps: int = 2) -> None:
    """One generated frame a second, twice as large, each `fps` times in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    import_cv2()  # before OpenCV first uses FFmpeg
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (448, 448))
    for frame in video.frames:
        picture = np.kron(frame.permute(1, 2, 0).numpy(), np.ones((4, 4, 1), dtype=np.uint8))
        for _ in range(fps):
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    writer.release()


def write_npy(path: Path, video: SyntheticVideo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, video.frames.permute(0, 2, 3, 1).numpy())


def write_folder(path: Path, video: SyntheticVideo) -> None:
    path.mkdir(parents=True)
    for index, frame in enumerate(video.frames):
        cv2.imwrite(str(path / f"frame_{index}.png"), frame.permute(1, 2, 0).numpy()[:, :, ::-1])


def choices(question: Question, letter: str) -> list[str]:
    """Four options (fewer if there are no more), the true answer at `letter`."""
    others = [word for word in ANSWERS[question.kind] if word != question.answer][:3]
    others.insert(min(ord(letter) - ord("A"), len(others)), question.answer)
    return others


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
    return path


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], env=env)


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("answers.*")) for line in path.read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


class Scripted:
    """In the place of a Stream: answers by a function of (prompt, times of the frames it was shown)."""

    def __init__(self, processor: Any, reply: Callable[[str, list[float]], str]) -> None:
        self.processor, self.reply = processor, reply
        self.times: list[float] = []

    def read_staged(self, frames: torch.Tensor, times: list[float]) -> None:
        assert len(frames) == len(times)
        self.times += times

    def ask(self, prompt: str, *, max_new_tokens: int, num_evidence: int) -> Answer:
        assert max_new_tokens >= 1
        self.processor.prompt(prompt)  # refuses what a Stream refuses
        answer = Answer(self.reply(prompt, list(self.times)))
        answer.num_tokens, answer.ttft, answer.seconds = 2, 0.25, 0.5
        last = self.times[-1]
        answer.evidence = tuple(Evidence(last, len(self.times) - 1, 0.5) for _ in range(num_evidence))
        return answer

    def stats(self) -> SimpleNamespace:
        counts = {"num_video_tokens": 16, "num_seen_tokens": 16 * len(self.times), "kv_bytes": 100}
        return SimpleNamespace(
            seconds=self.times[-1], num_frames=len(self.times), allocated_bytes=200, graphs="off: scripted", **counts
        )


class Silent:
    """In the place of the progress bar."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def video(self, name: str, num_frames: int | None) -> None: ...
    def frames(self, count: int) -> None: ...
    def watched(self) -> None: ...
    def problem(self, problem: Problem) -> None:
        self.problems.append(problem)


def scripted(
    name: str, data: Path, reply: Callable[[str, list[float]], str], judge: Judge | None = None, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and answers of a benchmark whose questions are answered by `reply`, both by method and control."""
    form, tiny = FORMATS[name], livevlm.load("tiny", device="cpu")
    plan = Plan(
        form, "scripted", settings={}, videos=(data,), out=data / "out",
        prompts=Prompts(form.prompt), max_new_tokens=dict(form.max_new_tokens),
        **{"config_for": lambda count: tiny.config, "fps": 1.0, "files": tuple(form.annotation_files(data)), **changes},
    )  # fmt: skip
    make: Any = lambda config: Scripted(tiny.processor, reply)  # noqa: E731
    assert evaluate(plan, tiny, judge, Shard(), Silent(), new_stream=make)
    result, _ = summarize(plan.out)
    return result, answers(plan.out)
