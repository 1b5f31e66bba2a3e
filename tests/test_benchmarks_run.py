# SPDX-License-Identifier: Apache-2.0
"""`livevlm eval` with the embedded checkpoint: known scores, killed and resumed, in shards, judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import livevlm
from eval_kit import FULL, answers, choices, run, summary, videos, write_json, write_mp4, write_npy
from livevlm.benchmarks.asking import AskedProcessor
from plain_model import answers as plain_answers

NUM_FRAMES = 24
ASKED = (8, 14, 20, 24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RVS-Ego and RVS-Movie (a stack), MLVU and StreamingBench in small, about the same two videos."""
    root = tmp_path_factory.mktemp("data")
    ego, movie, plot, real = [], [], [], []
    for i, video in enumerate(videos(2, NUM_FRAMES)):
        write_mp4(root / f"videos/v{i}.mp4", video)
        asked = video.questions(len(ASKED), seed=i, at=list(ASKED), kinds=("recall_colour", "recall_shape", "where"))
        turns = [{"question": q.text, "answer": q.answer, "start_time": 0, "end_time": q.frame - 1} for q in asked]
        ego.append({"video_id": f"v{i}", "video_path": f"/x/v{i}.mp4", "duration": 24, "conversations": turns})
        times = {"clip_start_time": 2, "clip_end_time": 20}
        if not movie:
            write_npy(root / "movie/videos/m0.npy", video)
            movie.append({**ego[-1], "video_id": "m0", "video_path": "/x/m0.npy", **times})
        last = video.questions(4, seed=i, kinds=("recall_colour", "where"))
        plot += [
            {"video": f"v{i}.mp4", "duration": 24, "question": q.text, "candidates": choices(q, "ABCD"[j]),
             "answer": q.answer, "question_type": "plotQA"}
            for j, q in enumerate(last)
        ]  # fmt: skip
        real.append({"video_path": f"v{i}.mp4", "questions": [
            {"task_type": q.kind, "question": q.text, "time_stamp": f"00:00:{q.frame - 1:02d}",
             "answer": "ABCD"[j % 4], "options": choices(q, "ABCD"[j % 4])}
            for j, q in enumerate(asked)
        ]})  # fmt: skip
    write_json(root / "ego4d_oe.json", ego)
    write_json(root / "movienet_oe.json", movie)
    write_json(root / "json/1_plotQA.json", plot)
    write_json(root / "questions_real.json", real)
    return root


def facts(lines: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, ...]]:
    """What must not depend on how a run went."""
    names = ("reply", "strict", "official", "ask_time", "seen_seconds", "num_frames", "num_video_tokens", "prompt")
    return {(line["role"], line["query"]): tuple(line[name] for name in names) for line in lines}


# ---------------------------------------------------------------- scores
def test_rvs_scores_what_transformers_alone_scores(data: Path, tmp_path: Path) -> None:
    """A full memory: every answer is that of the stock model about the frames seen by then."""
    entries = json.loads((data / "movienet_oe.json").read_text())
    right = total = 0
    expected: dict[tuple[str, str, int], str] = {}
    for video, entry in zip(videos(2, NUM_FRAMES), entries, strict=False):
        entry["conversations"][0]["answer"] = "wrong"
        turns = entry["conversations"]
        given = plain_answers(video.frames, [(turn["question"], turn["end_time"] + 1) for turn in turns])
        for turn, reply in zip(turns, given, strict=True):
            expected[entry["video_id"], turn["question"], turn["end_time"]] = reply
            right += reply == turn["answer"]
            total += 1
    file = write_json(tmp_path / "movienet_oe.json", entries)
    out = tmp_path / "out"
    result = run("rvs", "--data", data, "--annotations", file, "--out", out, "--fps", "1", "--no-control", *FULL)
    assert result.exit_code == 0, result.output
    lines = answers(out)
    assert {(line["video"], line["question"], line["ask_time"]): line["reply"] for line in lines} == expected
    assert summary(out)["method"]["averages"]["per question"]["strict"] == pytest.approx(right / total)
    assert 0.7 < right / total < 0.9  # one gold is wrong
    assert f"| per question | {100 * right / total:.1f} |" in result.stdout


def test_the_control_keeps_the_newest_frames(data: Path, tmp_path: Path) -> None:
    """Options as letters, at times; the same budget for both, of which the control makes less."""
    out = tmp_path / "out"
    options = ("--template", "{question}", "--budget", "25%", "--set", "clip_frames=4", "--context", "1000")
    plain = run("streamingbench", "--data", data, "--out", out, "--device", "cpu", *options[:-2])
    assert plain.exit_code == 0, plain.output
    found = summary(out)
    method, control = (found[role]["averages"]["real-time, per question"]["strict"] for role in ("method", "control"))
    assert method >= 0.8 and control <= method - 0.2, (method, control)
    assert {line["policy"] for line in answers(out) if line["role"] == "control"} == {"recent"}
    most = max(line["num_video_tokens"] for line in answers(out))
    assert {line["budget"] for line in answers(out)} == {6 * 16} == {most}
    # A window that holds everything is the stream itself.
    again = run("streamingbench", "--data", data, "--out", tmp_path / "window", "--device", "cpu", *options)
    assert again.exit_code == 0, again.output
    method_now = summary(tmp_path / "window")["method"]["averages"]["real-time, per question"]["strict"]
    assert abs(method_now - method) <= 0.2


def test_a_line_says_everything(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("mlvu", "--data", data, "--out", out, "--limit", "1", "--fps", "1", "--max-new-tokens", "2", *FULL)
    assert done.exit_code == 0, done.output
    lines = answers(out)
    assert len(lines) == 8
    for line in lines:
        assert line["num_frames"] == NUM_FRAMES and line["num_seen_tokens"] == NUM_FRAMES * 16
        assert line["ttft_ms"] > 0 and line["kv_bytes"] > 0 and line["judge"] == "none" and line["seed"] == 0
        assert line["model"] == "tiny" and line["livevlm"] == livevlm.__version__ and len(line["config_hash"]) == 16
        assert line["strict"] == (line["reply"] == line["options"]["ABCD".index(line["expected"])])
        assert (line["policy"], line["budget"]) in (("full", None), ("recent", 256))


def test_questions_do_not_change_each_other(data: Path, tmp_path: Path) -> None:
    """One question alone gets the answer that it gets among others: only where clips are cut may differ."""
    everything, one = tmp_path / "all", tmp_path / "one"
    options = ("--budget", "96", "--set", "clip_frames=1", "--template", "{question}", "--device", "cpu", "--fps", "1")
    assert run("rvs", "--data", data, "--out", everything, *options).exit_code == 0
    entries = json.loads((data / "ego4d_oe.json").read_text())
    entries[0]["conversations"] = entries[0]["conversations"][-1:]
    file = write_json(tmp_path / "ego4d_oe.json", entries[:1])
    assert run("rvs", "--data", data, "--annotations", file, "--out", one, *options).exit_code == 0
    alone, among = facts(answers(one)), facts(answers(everything))
    assert len(alone) == 2 and all(among[key] == value for key, value in alone.items())


# ---------------------------------------------------------------- killed, resumed, sharded
ARGUMENTS = ("rvs", "--budget", "96", "--set", "clip_frames=1", "--template", "{question}", "--device", "cpu")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of one process that nothing went wrong with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(*ARGUMENTS, "--data", data, "--out", out).exit_code == 0
    assert len(answers(out)) == 24  # three videos, four questions, two roles
    return out


def test_a_killed_process_goes_on_where_it_was(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = out / "answers.0of1.jsonl"
    code = "from livevlm.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", *ARGUMENTS, "--data", str(data), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = file.read_bytes()
    assert process.returncode == -signal.SIGKILL and 0 < before.count(b"\n") < 24
    with file.open("ab") as torn:
        torn.write(b'{"benchmark": "rvs", "ro')  # as a write that a crash of the machine cuts off
    resumed = run(*ARGUMENTS, "--data", data, "--out", out)
    assert resumed.exit_code == 0, resumed.output
    lines = answers(out)
    assert len(lines) == 24 and facts(lines) == facts(answers(whole))
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert summary(out)["method"]["averages"] == summary(whole)["method"]["averages"]
    again = run(*ARGUMENTS, "--data", data, "--out", out)  # nothing is left to do
    assert again.exit_code == 0 and len(answers(out)) == 24


def test_two_ranks_answer_what_one_does(data: Path, whole: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    for rank in ("1", "0"):
        env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        done = run(*ARGUMENTS, "--data", data, "--out", two, env=env)
        assert done.exit_code == 0, done.output
        assert (two / "summary.json").exists() == (rank == "0")  # the last one adds up
    shares = {path.name: path.read_text().count("\n") for path in two.glob("answers.*")}
    assert shares == {"answers.0of2.jsonl": 16, "answers.1of2.jsonl": 8}  # two videos and one
    assert facts(answers(two)) == facts(answers(whole)) and len(answers(two)) == len(answers(whole))
    for role in ("method", "control"):
        for part in ("averages", "tasks", "groups"):
            assert summary(two)[role][part] == summary(whole)[role][part]
    alone = run(*ARGUMENTS, "--data", data, "--out", two)  # one process finds what two have answered
    assert alone.exit_code == 0, alone.output
    assert len(answers(two)) == len(answers(whole))
    printed = run("summary", two, "--json")
    assert json.loads(printed.stdout)["method"]["averages"] == summary(whole)["method"]["averages"]


def test_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ("rvs", "--data", data, "--out", out, "--limit", "1", "--template", "{question}", "--device", "cpu")
    assert run(*base, "--budget", "96").exit_code == 0
    count = len(answers(out))
    for other, says in (
        (("--budget", "128"), "settings.budget: 96 there, 128 now"),
        (("--budget", "96", "--fps", "1"), "fps: 0.5 there, 1.0 now"),
        (("--budget", "96", "--policy", "uniform"), "settings.policy: 'novelty' there, 'uniform' now"),
        (("--budget", "96", "--judge-url", "http://localhost:1/v1", "--judge-model", "j"), "judge: 'none' there, 'j@"),
    ):
        result = run(*base, *other)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 2  # "reading ...", and the error
    (out / "run.json").unlink()  # the lines themselves say it, too
    result = run(*base, "--budget", "128")
    assert result.exit_code == 2 and "answers.0of1.jsonl:1: an answer of another configuration" in result.stderr
    assert len(answers(out)) == count


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "policy=full"), "allowed are NAME=VALUE"),
        (("--set", "alpha=7"), "alpha=7 must lie between 0 and 1"),
        (("--template", "what"), "must hold {question}"),
        (("--judge-url", "http://x/v1"), "--judge-url needs --judge-model"),
        (("--judge-url", "x:8000/v1", "--judge-model", "j"), "'x:8000/v1' must begin with http:// or https://"),
        (("--judge-model", "gpt"), "--judge-model 'gpt' is no folder; a model elsewhere needs --judge-url"),
        (("--task", "Counting"), "--task 'Counting': no question is of it; there are 'RVS-Ego', 'RVS-Movie'"),
        (("--out", "/proc/no"), "--out /proc/no cannot be made"),
        (("--policy", "full", "--budget", "25%"), "give it no --budget"),
        (("--model", "/no/such/model"), "'/no/such/model' is no folder"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], says: str, data: Path, tmp_path: Path) -> None:
    result = run("rvs", "--data", data, "--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert result.exit_code == 2 and says in result.stderr, result.stderr


def test_an_unfinished_line_between_others_is_an_error(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ("rvs", "--data", data, "--out", out, "--limit", "1", "--template", "{question}", "--device", "cpu")
    assert run(*base).exit_code == 0
    file = out / "answers.0of1.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    result = run(*base)
    assert result.exit_code == 2 and "answers.0of1.jsonl:2: not an answer" in result.stderr


# ---------------------------------------------------------------- prompts
def test_the_prefix_and_the_retrieval_text() -> None:
    """The answer goes on behind the prefix; a retrieval pass of its own sees the question without its options."""
    tiny = livevlm.load("tiny", device="cpu").processor
    asked = AskedProcessor(tiny.tokenizer, tiny.mean, tiny.std, tiny.chat_template, prefix="red star", about="what ?")
    before, after = asked.prompt("where was the red star ?")
    plain_before, plain_after = tiny.prompt("where was the red star ?")
    assert torch.equal(before, plain_before) and torch.equal(after[:-2], plain_after)
    assert torch.equal(after[-2:], tiny.text("red star"))
    assert torch.equal(asked.text("where was the red star ?"), tiny.text("what ?"))


def test_help_needs_no_torch() -> None:
    code = "import sys; from livevlm.cli import main; main(['eval', '--help'], standalone_mode=False); "
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("streamingbench", "ovobench", "rvs", "cgbench", "summary"))
