# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` on rows far longer than a memory: kernels split them over many programs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kit
from livevlm_kernels import select_tokens
from test_select_tokens import expect, greedy

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("select_tokens"))
LENGTH = 100_000 if kit.INTERPRETED else 300_000 if kit.EMULATED else 1_000_000
SPLIT = 5_000 if kit.INTERPRETED else 40_000  # beyond what the CUDA kernel gives to one block


def expect_reference(scores, budget, backend, **options):
    results = (select_tokens(scores, budget, **options, backend=b) for b in (backend, "reference"))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y), (budget, options)


@each_backend
@pytest.mark.parametrize(("ratio", "capacity"), [(0.0, 1), (0.5, 1), (0.5, 3), (1.0, 1)])
def test_long_rows(ratio, capacity, backend, device):
    scores = torch.randint(0, 3000, (1, LENGTH), device=device).float()  # every score is there many times
    scores[0, ::5003] = torch.inf
    scores[0, 1::7] = torch.nan
    budget = LENGTH // 10
    result = select_tokens(scores, budget, scatter_ratio=ratio, bucket_capacity=capacity, backend=backend)
    expect([greedy(scores[0].tolist(), budget, ratio, None, capacity, None)], result, budget)


@each_backend
def test_a_long_row_with_few_valid_tokens(backend, device):
    scores = torch.full((2, LENGTH), torch.nan, device=device)
    scores[0, [5, 70_000, 99_999]] = torch.tensor([1.0, -torch.inf, 2.0], device=device)
    scores[1, :] = torch.inf
    lens = torch.tensor([LENGTH, 3], device=device)
    result = select_tokens(scores, 70_001, seq_lens=lens, scatter_ratio=0.5, backend=backend)
    expect([[5, 99_999], [0, 1, 2]], result, 70_001)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("seq_len", [33, 1025] if kit.INTERPRETED else [31, 33, 18_272, 32_767, 32_768, 32_769, 40_000])
def test_around_what_shared_memory_holds(seq_len, capacity, dtype, backend, device):
    """The CUDA kernel keeps the keys of up to 32,768 tokens in shared memory; longer rows go to several blocks."""
    rng = random.Random(seq_len)
    for ratio in (0.0, 0.5, 1.0):
        scores = (torch.randn(2, seq_len, device=device) ** 3).to(dtype)
        for special in (torch.nan, torch.inf, -torch.inf):
            scores[torch.rand(scores.shape, device=device) < 0.01] = special
        num_buckets = rng.choice([None, 7, seq_len // 3 + 1])
        buckets = torch.randint(-1, (num_buckets or 0) + 1, scores.shape, dtype=torch.int32, device=device)
        options = {
            "budget": max(1, int(seq_len * rng.choice([0.02, 0.1, 0.65, 0.97]))),
            "seq_lens": torch.tensor([seq_len, rng.randint(0, seq_len)], device=device),
            "scatter_ratio": ratio,
            "num_buckets": num_buckets,
            "bucket_capacity": capacity,
            "buckets": buckets if num_buckets and rng.random() < 0.5 else None,
        }
        expect_reference(scores, backend=backend, **options)


@each_backend
@pytest.mark.parametrize("value", [0.0, torch.inf, 3.5])
def test_ties_are_taken_from_the_start_of_a_long_row(value, backend, device):
    scores = torch.full((2, SPLIT), value, device=device)
    if value == 0:
        scores[:, ::2] = -value  # both zeros, in turns
    scores[1, ::3] = -1.0
    for budget in (31, SPLIT // 4 + 3, SPLIT):
        for ratio in (0.0, 0.7):
            expect_reference(scores, budget, backend, scatter_ratio=ratio)
    assert select_tokens(scores[0], 4321, backend=backend)[0].tolist() == list(range(4321))


@each_backend
def test_lengths_of_long_rows(backend, device):
    """Lengths of words and of chunks, and one more or less; a row's result does not depend on its batch."""
    lens = [0, 1, 32, 33, 8191, 8192, 8193, SPLIT - 1, SPLIT, SPLIT + 99]
    scores = torch.randint(0, 50, (len(lens), SPLIT), device=device).float()
    scores[:, 5::7] = torch.nan
    scores[:, 11::4999] = torch.inf
    options = {"seq_lens": torch.tensor(lens, device=device), "scatter_ratio": 0.6, "num_buckets": 40}
    for capacity in (1, 60):
        expect_reference(scores, 3000, backend, bucket_capacity=capacity, **options)
    together = select_tokens(scores, 3000, backend=backend, **options)
    for row in range(0, len(lens), 3):
        alone = {**options, "seq_lens": options["seq_lens"][row : row + 1]}
        for x, y in zip(select_tokens(scores[row : row + 1], 3000, backend=backend, **alone), together, strict=True):
            assert torch.equal(x[0], y[row])


@each_backend
@pytest.mark.parametrize("kind", ["seconds", "any", "one", "none"])
@pytest.mark.parametrize("capacity", [1, 4, 100_000])
def test_given_buckets_of_long_rows(kind, capacity, backend, device):
    token = torch.arange(SPLIT, device=device)
    buckets = {
        "seconds": (token / SPLIT) ** 3 * 500,  # as time goes by: crowded at first, then few tokens each
        "any": torch.randint(-3, 503, (SPLIT,), device=device),
        "one": torch.full((SPLIT,), 499, device=device),
        "none": torch.full((SPLIT,), -1, device=device),
    }[kind].to(torch.int32)
    for scores in (torch.randn(SPLIT, device=device), torch.randint(0, 3, (SPLIT,), device=device).half()):
        for budget, ratio in ((300, 1.0), (600, 0.9), (SPLIT // 2, 0.5)):
            options = {"num_buckets": 500, "bucket_capacity": capacity, "scatter_ratio": ratio}
            expect_reference(scores, budget, backend, buckets=buckets, **options)


@each_backend
def test_strides_of_long_rows(backend, device):
    scores = torch.randn(SPLIT, 6, device=device).bfloat16().T[::2]
    expect_reference(scores, 1000, backend, scatter_ratio=0.5)
    assert scores.stride() == (2, 6)


@pytest.mark.parametrize(
    ("backend", "device"), [case for case in kit.cases("select_tokens") if case.values[0] in ("cuda", "emulated")]
)
def test_short_rows_by_several_blocks(backend, device):
    """All cases of test_select_tokens.py, which the CUDA kernel gives to several blocks only when asked to."""
    tests = Path(__file__).with_name("test_select_tokens.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", f"{backend}-{device}"]
    subprocess.run(command, check=True, env=os.environ | {"LIVEVLM_SELECT": "split"})
