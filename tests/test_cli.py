# SPDX-License-Identifier: Apache-2.0
"""`livevlm ask`, `livevlm env` and `livevlm bench` as a person types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import livevlm
from livevlm.cli import main
from livevlm.cli.values import format_bytes, format_time, parse_time
from livevlm.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLE = str(EXAMPLES / "sample.mp4")
ASKED = json.loads((EXAMPLES / "sample.json").read_text())["questions"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_the_sample_at_a_quarter_of_its_tokens() -> None:
    """Right answers to every question the example ships, most kinds of them, some asked in mid-stream."""
    command = ["ask", SAMPLE, "--budget", "25%", "--json"]
    for item in ASKED:
        at_end = item["time"] == "01:04"
        command += [item["question"]] if at_end else ["--at", item["time"], item["question"]]
    result = run(*command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["stats"]["num_video_tokens"] == 256
    assert report["stats"]["num_seen_tokens"] == 64 * 16
    got = {answer["question"]: answer["answer"] for answer in report["answers"]}
    right = {item["kind"] for item in ASKED if got[item["question"]] == item["answer"]}
    wrong = {q["question"]: got[q["question"]] for q in ASKED if got[q["question"]] != q["answer"]}
    assert len(right) >= 6 and len(wrong) <= 1, wrong
    for answer in report["answers"]:
        assert answer["evidence"] and answer["ttft_ms"] > 0
        assert all(0 <= item["time"] <= answer["time"] for item in answer["evidence"])
    timed = {item["question"]: item["time"] for item in ASKED if item["time"] != "01:04"}
    for answer in report["answers"]:
        if answer["question"] in timed:
            assert abs(answer["time"] - parse_time(timed[answer["question"]])) <= 1


def test_what_a_person_reads() -> None:
    early, late = ASKED[0], ASKED[-1]
    typed = late["question"].capitalize().replace(" ?", "?")
    result = run("ask", SAMPLE, typed, "--at", early["time"], early["question"], "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert typed in result.stdout
    for item in (early, late):
        assert f"       {item['answer']}   seen at" in result.stdout, result.stdout
    assert "seen at 00:" in result.stdout and "first token after" in result.stdout
    assert "256 tokens (budget 256), 1.5 MiB (25% of the 1024 seen)" in " ".join(result.stdout.split())


def test_options_reach_the_stream() -> None:
    options = "--policy recent --budget 320 --fps 0.5 --retrieval mean_key --max-new-tokens 1 --device cpu --for 30"
    options += " --max-delay 0 --drop never"
    result = run("ask", SAMPLE, "where was the star ?", *options.split(), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    config = report["config"]
    assert (config["policy"], config["budget"], config["retrieval"]) == ("recent", 320, "mean_key")
    assert report["stats"]["num_frames"] == 16 and report["answers"][0]["num_tokens"] <= 1


def bad_files(folder: Path) -> dict[str, str]:
    (folder / "notes.mp4").write_text("this is text")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(Path(SAMPLE).read_bytes()[:120_000])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return {
        "missing.mp4": "",
        "notes.mp4": "",
        "empty.mp4": "",
        "cut.mp4": "",
        "sound.wav": "no video",
    }


def test_bad_videos(tmp_path: Path) -> None:
    for name, says in bad_files(tmp_path).items():
        result = run("ask", str(tmp_path / name), "what ?")
        assert result.exit_code == 2, (name, result.output)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), (name, lines)
        assert name in lines[0] and says in lines[0], lines[0]
        assert not result.stdout, (name, result.stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([SAMPLE, ""], "question='' is empty"),
        ([SAMPLE, "what ?", "--budget", "0"], "budget 0 must be at least 1"),
        ([SAMPLE, "what ?", "--budget=-3"], "budget -3 must be at least 1"),
        ([SAMPLE, "what ?", "--budget", "0%"], "budget '0%' must be above 0%"),
        ([SAMPLE, "what ?", "--budget", "15"], "budget=15 tokens is too small"),
        ([SAMPLE, "what ?", "--budget", "much"], "budget 'much' is not understood"),
        ([SAMPLE, "what ?", "--fps", "0"], "fps=0"),
        ([SAMPLE, "what ?", "--model", "/no/such/model"], "'/no/such/model' is no folder"),
        ([SAMPLE, "--at", "02:00", "what ?"], "--at 02:00 is after the video's end at 01:04"),
        ([SAMPLE, "--at", "00:42", "what ?", "--for", "00:10"], "--at 00:42 is after --for 00:10"),
        ([SAMPLE, "what <video> ?"], "a marker of the model"),
        ([SAMPLE, "what ?", "--policy", "full", "--budget", "25%"], "give it no --budget"),
        ([SAMPLE, "what ?", "--device", "meta"], "device='meta'"),
        ([SAMPLE, "what ?", "--device", "abacus"], "device='abacus'"),
    ],
)
def test_bad_values(arguments: list[str], says: str) -> None:
    result = run("ask", *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([SAMPLE], "at least one QUESTION"),
        ([SAMPLE, "what ?", "--policy", "best"], "'best' is not one of 'vision_sink', 'clip_merge', 'similarity'"),
        ([SAMPLE, "--at", "soon", "what ?"], "time 'soon' is not understood"),
        ([SAMPLE, "what ?", "--max-new-tokens", "0"], "0"),
        ([], "Missing argument"),
    ],
)
def test_usage_errors(arguments: list[str], says: str) -> None:
    result = run("ask", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_env() -> None:
    text, facts = run("env"), json.loads(run("env", "--json").stdout)
    assert text.exit_code == 0
    assert "torch" in facts and "livevlm" in " ".join(facts)
    assert all(name in text.stdout for name in facts)


def test_installed_command() -> None:
    """The console script, in a process of its own: stdout carries the JSON alone, stderr nothing from libraries."""
    command = shutil.which("livevlm", path=str(Path(sys.executable).parent))
    start = [command] if command else [sys.executable, "-c", "from livevlm.cli import main; main()"]
    done = subprocess.run(
        [*start, "ask", SAMPLE, ASKED[-1]["question"], "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"][0]["answer"] == ASKED[-1]["answer"]
    assert done.stderr == ""


def test_bench_kernels(tmp_path: Path) -> None:
    result = run("bench", "kernels", "compression", "--device", "cpu", "--results", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "compression.csv").read_text().splitlines()
    assert rows[0].startswith("op,provider,shape,dtype,gpu,versions,median_us,p20_us,p80_us")
    for policy in ("vision_sink", "similarity", "clip_merge"):
        assert policy in result.stdout
        assert {row.split(",")[1] for row in rows if policy in row} >= {"reference", "eager"}
    unknown = run("bench", "kernels", "attention")
    assert unknown.exit_code == 2 and "no benchmark is called attention; there are" in unknown.stderr


def test_times_and_sizes() -> None:
    assert [parse_time(t) for t in ("7", "00:42", "1:02:03.5")] == [7, 42, 3723.5]
    assert [parse_time(t) for t in ("90", "90:00", "1:2")] == [90, 5400, 62]
    for text in ("", "1:2:3:4", "-1", "1:", "a", "00:70", "1:60:00"):
        with pytest.raises(ConfigError, match="not understood"):
            parse_time(text)
    assert [format_time(t) for t in (0, 64.9, 3723)] == ["00:00", "01:04", "1:02:03"]
    assert [format_bytes(b) for b in (12, 2048, 3 * 2**30)] == ["12 B", "2.0 KiB", "3.0 GiB"]


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no room for 5 tokens")

    monkeypatch.setattr(livevlm.Stream, "read_staged", full)
    result = run("ask", SAMPLE, "what ?", "--device", "cpu")
    assert result.exit_code == 2 and result.stderr.strip() == "Error: no room for 5 tokens"
