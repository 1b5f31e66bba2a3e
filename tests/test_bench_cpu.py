# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on a CPU too: each op's compiled kernel against its reference, and the harness itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import livevlm_kernels
from livevlm_kernels import summarize_blocks

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("bench_kit", BENCH / "kit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_kit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", livevlm_kernels.backends("summarize_blocks", "cpu"))
def test_summarize_blocks(benchmark, backend):
    k = torch.randn(4, 784, 4, 128).bfloat16()
    result = benchmark(summarize_blocks, k, block_size=16, backend=backend)
    torch.testing.assert_close(result, k.float().unflatten(1, (-1, 16)).mean(2))


def run_small(harness, path, providers):
    bench = harness.Bench("an_op", "cpu", path)
    return bench.run("4x4", torch.float32, lambda: {"x": torch.ones(4, 4)}, moved=128, providers=providers)


def test_rows_are_replaced_by_key(harness, tmp_path):
    twice = {"reference": lambda s: s["x"] * 2, "other": lambda s: s["x"] + s["x"]}
    run_small(harness, tmp_path, twice)
    rows = run_small(harness, tmp_path, twice)
    assert [row.provider for row in rows] == ["reference", "other"]
    assert all(row.p20_us <= row.median_us <= row.p80_us for row in rows)
    assert len((tmp_path / "an_op.csv").read_text().splitlines()) == 3
    run_small(harness, tmp_path, {"third": lambda s: s["x"]})
    assert len((tmp_path / "an_op.csv").read_text().splitlines()) == 4


def test_a_wrong_kernel_is_not_timed(harness, tmp_path):
    with pytest.raises(AssertionError):
        run_small(harness, tmp_path, {"reference": lambda s: s["x"], "wrong": lambda s: s["x"] + 1})
    assert not list(tmp_path.iterdir())


def test_shared_memory_counts_once(harness):
    x = torch.zeros(10)
    assert harness.nbytes([x, x[2:], torch.zeros(5)]) == 60
