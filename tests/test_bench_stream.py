# SPDX-License-Identifier: Apache-2.0
"""`livevlm bench stream` on the CPU, with the tiny model: what it measures, the files it writes, what it resumes."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from livevlm.benchmark import parts, profiling, timing
from livevlm.benchmark.report import Report, Row
from livevlm.benchmark.subject import QUESTION_TOKENS, shape_config, subject_for
from livevlm.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "stream", "--device", "cpu", "--repeats", "2", *arguments])


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "stream_tiny.json").read_text())["rows"]


def test_all_parts_and_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--frames", "20", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = {(row["part"], row["system"], row["metric"]) for row in rows(tmp_path)}
    for part, system in (("live", "livevlm"), ("kept", "stock"), ("oneshot", "stock one-shot")):
        assert {(part, system, metric) for metric in ("TTFT ms", "decode ms/token", "host GB")} <= found
    of_live = [row for row in rows(tmp_path) if row["part"] == "live" and row["metric"] == "TTFT ms"]
    assert [row["history"] for row in of_live] == [16, 20]
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] and row["samples"] == 2 for row in of_live)
    encode = [(row["system"], row["frames"]) for row in rows(tmp_path) if row["part"] == "encode"]
    assert encode == [(system, frames) for system in ("livevlm", "stock") for frames in parts.CALLS]
    notes = [row["note"] for row in rows(tmp_path) if row["part"] == "retrieval" and row["metric"] == "TTFT ms"]
    assert notes == ["mean_key, 40%", "mass, 40%", "frame, 40%", "all of the memory"]
    read = {(row["system"], row["metric"]): row["note"] for row in rows(tmp_path) if row["part"] == "file"}
    assert read["livevlm", "encode ms/frame"] == "20 of 20 frames, decoding included"
    assert {("decoder", "decode ms/frame"), ("livevlm", "TTFT ms"), ("livevlm", "decode ms/token")} < set(read)
    with (tmp_path / "stream_tiny.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows(tmp_path))
    for plot in ("ttft", "decode", "encode", "host"):
        assert (tmp_path / f"stream_tiny-{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"stream_tiny-{plot}.svg").read_text()
    facts = json.loads((tmp_path / "stream_tiny.json").read_text())["parts"]["live"]
    assert facts["frames"] == 20 and facts["stock_cudnn_attention"] is False and facts["torch"] == torch.__version__
    assert all(line in result.stdout for line in ("TTFT ms", "stream_tiny-ttft.svg"))


def test_parts_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = ("--frames", "8", "--out", str(tmp_path))
    assert run("--parts", "live", "--no-plots", *out).exit_code == 0
    first = rows(tmp_path)
    missing = run("--parts", "floor", *out)
    assert missing.exit_code == 2 and "livevlm[bench]" in missing.stderr
    assert [row for row in rows(tmp_path) if row["part"] == "live"] == first
    assert run("--parts", "live", "--no-plots", *out).exit_code == 0
    again = [row for row in rows(tmp_path) if row["part"] == "live"]
    assert len(again) == len(first) and again != first


def test_ends_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, plan = subject_for("tiny", None, "cpu"), parts.Plan(64, repeats=1)
    late = list(parts.live(subject, plan, timing.Limit(0)))
    assert late[-1].median is None and "are over" in late[-1].note and late[-1].history == 16

    def full(self: object, pixels: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(parts.Stock, "_features", full)
    for part in (parts.kept, parts.oneshot):
        (end,) = part(subject, plan, timing.Limit(60))
        assert end.median is None and "out of memory" in end.note
    report = Report(tmp_path, "stream_tiny", {})
    report.replace("kept", [end])
    assert Report(tmp_path, "stream_tiny", {}).rows == [end] and isinstance(end, Row) and "out of memory" in end.line()


def test_both_answer_the_same_question() -> None:
    """Stock transformers, as measured, computes what livevlm computes with everything kept."""
    subject = subject_for("tiny", None, "cpu")
    assert len(subject.question_ids) + 1 == QUESTION_TOKENS
    pixels = torch.randn(5, 3, *[subject.model.config.vision_config.image_size] * 2)
    stock = parts.Stock(subject)
    for part in pixels.split(2):
        stock.push(part)
    kept = stock.cache.get_seq_length()
    assert kept == len(stock.prompt) + 5 * 16
    assert all(value > 0 for value in stock.ask(2))
    assert stock.cache.get_seq_length() == kept
    chunked = stock._forward(stock._with_newline(stock.question))
    assert all(value > 0 for value in stock.ask_at_once(pixels, 0)[:1])
    live = parts.Live(subject, policy="full", retrieval="none")
    cache = live.stream.cache
    cache.prefill_prompt(stock.prompt)
    cache.push(pixels, torch.arange(5))
    with cache.question(), torch.no_grad():
        embeds = cache.adapter.embed_question(subject.question_ids)
        hidden = cache.adapter.language_model(inputs_embeds=embeds[None], past_key_values=cache).last_hidden_state
        assert int(cache.adapter.logits(hidden[:, -1]).argmax()) == int(chunked)


KERNEL = re.compile(r"__global__ void\s*(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(([^)]*)\)")


def test_kernels_of_ours_have_their_kinds() -> None:
    kinds: dict[str, set[str]] = {}
    for folder in ("kv_evict", "kv_merge", "block_attention"):
        for path in sorted((Path(__file__).parents[1] / "csrc" / folder).glob("*.cu*")):
            for name, arguments in KERNEL.findall(path.read_text("utf-8")):
                struct = re.search(r"__grid_constant__ (\w+)", arguments)
                demangled = f"void livevlm::{name}<float>(livevlm::{struct[1] if struct else ''})"
                kinds.setdefault(folder, set()).add(profiling.kind_of(demangled))
                assert profiling.kind_of(demangled) != "elementwise", demangled
    assert kinds["kv_evict"] == kinds["kv_merge"] == {"compression"}
    assert kinds["block_attention"] == {"attention", "retrieval", "compression"}  # the last: quantize_blocks
    assert profiling.kind_of("vectorized_elementwise_kernel") == "elementwise"


def test_time_of_kernels_that_overlap_is_counted_once() -> None:
    kernels = [("late", 9.0, 10.0), ("first", 0.0, 4.0), ("waits", 1.0, 6.0), ("within", 2.0, 5.0), ("first", 6.0, 7.5)]
    shares = profiling.exclusive(kernels)
    assert shares == [("first", 4.0), ("waits", 2.0), ("within", 0.0), ("first", 1.5), ("late", 1.0)]


def test_shapes() -> None:
    """The sizes of the published checkpoints, to the byte."""
    from transformers import LlavaOnevisionForConditionalGeneration

    for shape, parameters in (("0.5b", 893_700_000), ("7b", 8_030_800_000)):
        with torch.device("meta"):
            model = LlavaOnevisionForConditionalGeneration._from_config(shape_config(shape))
        assert abs(sum(weight.numel() for weight in model.parameters()) / parameters - 1) < 0.001


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "all"], "parts 'all': allowed are floor"),
        (["--shape", "tiny", "--model", "tiny"], "not both"),
        (["--model", "/no/such/model"], "is no folder"),
        (["--budget", "much"], "not understood"),
        (["--shape", "70b"], "not one of"),
    ],
)
def test_bad_values(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr
