# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` on rows far longer than a memory: kernels split them over many programs."""

from __future__ import annotations

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
