# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` on rows far longer than a memory: kernels split them over many programs."""

from __future__ import annotations

import random

import pytest
import torch

import kit
from livevlm_kernels import select_tokens
from test_select_tokens import expect, greedy

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("select_tokens"))
LENGTH = 100_000 if kit.INTERPRETED else 1_000_000


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
    """The CUDA kernel keeps the keys of up to 32,768 tokens in shared memory."""
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
        results = (select_tokens(scores, **options, backend=b) for b in (backend, "reference"))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y), options
