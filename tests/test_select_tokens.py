# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` against the greedy walk it is defined by, written as plain loops."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, select_tokens

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("select_tokens"))
INF, NAN = math.inf, math.nan


def greedy(scores, budget, ratio, num_buckets, capacity, buckets):
    """The walk of the docstring over one row of valid scores."""
    if num_buckets is None:
        num_buckets = math.ceil(budget / capacity)
    if buckets is None:
        buckets = [p * num_buckets // len(scores) for p in range(len(scores))]
    order = [i for i, s in enumerate(scores) if not math.isnan(s) and s > -INF]
    order.sort(key=lambda i: -scores[i])  # stable: the lower index first
    num_top = max(round((1 - ratio) * budget), sum(s == INF for s in scores))
    taken = order[:num_top][:budget]
    held = Counter(buckets[i] for i in taken)
    skipped = []
    for i in order[num_top:]:
        inside = 0 <= buckets[i] < num_buckets
        if len(taken) < budget and inside and held[buckets[i]] < capacity:
            taken.append(i)
            held[buckets[i]] += 1
        else:
            skipped.append(i)
    taken += skipped[: budget - len(taken)]
    return sorted(taken)


def expect(rows, result, budget):
    indices, counts = result
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.tolist() == [row + [-1] * (budget - len(row)) for row in rows]
    assert counts.tolist() == [len(row) for row in rows]


def draw_scores(rng, seq_len):
    levels = rng.choice([2, 5, 1000])  # few levels: many ties
    special = rng.choice([0.0, 0.1, 0.5])
    return [
        rng.choice([INF, -INF, NAN, -0.0]) if rng.random() < special else rng.randrange(levels) / 8
        for _ in range(seq_len)
    ]


@each_backend
def test_random_sweep_against_the_greedy_walk(backend, device):
    rng = random.Random(0)
    compiles = (backend, device) == ("triton", "cuda")  # anew for each kind of size
    for _ in range(40 if compiles else 100 if kit.SLOW else 400):
        batch, seq_len = rng.randint(1, 4), rng.randint(1, 40)
        budget, ratio, capacity = rng.randint(1, seq_len), rng.choice([0, 0.3, 0.5, 1]), rng.randint(1, 3)
        num_buckets = rng.choice([None, 1, rng.randint(1, 2 * seq_len)])
        explicit = num_buckets is not None and rng.random() < 0.5
        scores = [draw_scores(rng, seq_len) for _ in range(batch)]
        lens = [rng.randint(0, seq_len) for _ in range(batch)]
        buckets = [[rng.randint(-2, num_buckets + 1) for _ in range(seq_len)] for _ in scores] if explicit else None
        result = select_tokens(
            torch.tensor(scores, device=device),
            budget,
            seq_lens=torch.tensor(lens, device=device),
            scatter_ratio=ratio,
            num_buckets=num_buckets,
            bucket_capacity=capacity,
            buckets=torch.tensor(buckets, dtype=torch.int32, device=device) if explicit else None,
            backend=backend,
        )
        rows = [
            greedy(row[:n], budget, ratio, num_buckets, capacity, buckets[b][:n] if explicit else None) if n else []
            for b, (row, n) in enumerate(zip(scores, lens, strict=True))
        ]
        expect(rows, result, budget)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
def test_budget_of_the_paper(ratio, dtype, backend, device):
    scores = torch.randn(2, 18_272, device=device).to(dtype)  # 12,000 kept, then a clip of 32 frames; bf16 has ties
    result = select_tokens(scores, 12_000, scatter_ratio=ratio, backend=backend)
    expect([greedy(row, 12_000, ratio, None, 1, None) for row in scores.tolist()], result, 12_000)


@each_backend
def test_ratio_0_is_top_k(backend, device):
    scores = torch.randperm(997, device=device).float()
    indices, count = select_tokens(scores, 101, backend=backend)
    assert torch.equal(indices.long(), scores.topk(101).indices.sort().values)
    assert count.item() == 101 and count.shape == ()


@each_backend
def test_ratio_1_gives_each_bucket_its_best_token(backend, device):
    scores = torch.randperm(1000, device=device).float()
    indices, _ = select_tokens(scores, 10, scatter_ratio=1.0, backend=backend)
    best = scores.view(10, 100).argmax(1) + 100 * torch.arange(10, device=device)
    assert torch.equal(indices.long(), best)


@each_backend
def test_buckets_by_timestamp(backend, device):
    # Nine tokens of the last second outscore the one token of each earlier second.
    buckets = torch.tensor([0, 1, 2] + [3] * 9, dtype=torch.int32, device=device)
    scores = torch.arange(12.0, device=device)
    indices, _ = select_tokens(scores, 4, scatter_ratio=1.0, buckets=buckets, num_buckets=4, backend=backend)
    assert indices.tolist() == [0, 1, 2, 11]
    indices, _ = select_tokens(scores, 4, scatter_ratio=0.5, buckets=buckets, num_buckets=4, backend=backend)
    assert indices.tolist() == [1, 2, 10, 11]


@each_backend
def test_full_buckets_are_filled_up_by_score(backend, device):
    buckets = torch.zeros(6, dtype=torch.int32, device=device)
    scores = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 0.0], device=device)
    indices, counts = select_tokens(scores, 3, scatter_ratio=1.0, buckets=buckets, num_buckets=2, backend=backend)
    assert indices.tolist() == [1, 2, 3] and counts.item() == 3


@each_backend
def test_always_kept_never_kept(backend, device):
    scores = torch.tensor([[5.0, INF, 4.0, INF, INF, 6.0], [NAN, -INF, 1.0, NAN, INF, -INF]], device=device)
    assert select_tokens(scores, 2, backend=backend)[0].tolist() == [[1, 3], [2, 4]]
    indices, counts = select_tokens(scores, 4, scatter_ratio=1.0, num_buckets=2, backend=backend)
    assert indices.tolist() == [[1, 3, 4, 5], [2, 4, -1, -1]]  # both buckets are full: 5 comes by its score
    assert counts.tolist() == [4, 2]


@each_backend
def test_equal_scores_and_negative_zero(backend, device):
    scores = torch.tensor([-0.0, 0.0] * 50, device=device)
    assert select_tokens(scores, 7, backend=backend)[0].tolist() == list(range(7))
    assert select_tokens(scores, 4, scatter_ratio=1.0, backend=backend)[0].tolist() == [0, 25, 50, 75]


@each_backend
def test_whole_budget_is_identity(backend, device):
    scores = torch.randn(3, 17, device=device)
    indices, counts = select_tokens(scores, 17, scatter_ratio=0.5, num_buckets=3, backend=backend)
    assert indices.tolist() == [list(range(17))] * 3 and counts.tolist() == [17] * 3


@each_backend
def test_leading_dimensions_and_views(backend, device):
    scores = torch.randn(23, 3, 2, device=device).permute(1, 2, 0)  # no dimension collapses
    lens = torch.tensor([[0, 1], [22, 23], [5, 99]], device=device)
    indices, counts = select_tokens(scores, 6, seq_lens=lens, scatter_ratio=0.5, backend=backend)
    assert indices.shape == (3, 2, 6) and counts.tolist() == [[0, 1], [6, 6], [5, 6]]
    for i in range(3):
        for j in range(2):
            row = select_tokens(scores[i, j].contiguous(), 6, seq_lens=lens[i, j], scatter_ratio=0.5, backend=backend)
            assert torch.equal(row[0], indices[i, j])  # a row does not depend on its batch


@each_backend
def test_what_lies_beyond_the_length_does_not_matter(backend, device):
    scores = torch.randn(1, 50, device=device)
    lens = torch.tensor([30], device=device)
    results = []
    for garbage in (NAN, INF, -INF, 1e30):
        scores[:, 30:] = garbage
        results.append(select_tokens(scores, 20, seq_lens=lens, scatter_ratio=0.7, backend=backend)[0].tolist())
    assert all(result == results[0] for result in results) and max(results[0][0]) < 30


GOOD = torch.randn(2, 8)
BUCKETS = torch.zeros(2, 8, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("scores", "budget", "arguments", "message"),
    [
        ([1.0], 1, {}, r"scores must be a torch.Tensor, not list"),
        (GOOD.double(), 1, {}, r"scores has dtype float64; allowed: float32, float16, bfloat16"),
        (GOOD[:, :0], 1, {}, r"scores is empty: its shape is \(2, 0\)"),
        (torch.tensor(1.0), 1, {}, r"scores must have at least 1 dimensions"),
        (GOOD, 0, {}, r"budget=0 must lie between 1 and 8"),
        (GOOD, 9, {}, r"budget=9 must lie between 1 and 8"),
        (GOOD, 2, {"scatter_ratio": 1.1}, r"scatter_ratio=1.1 must lie between 0 and 1"),
        (GOOD, 2, {"scatter_ratio": NAN}, r"scatter_ratio=nan must lie between 0 and 1"),
        (GOOD, 2, {"bucket_capacity": 0}, r"bucket_capacity=0 must be at least 1"),
        (GOOD, 2, {"num_buckets": 0}, r"num_buckets=0 must be at least 1"),
        (GOOD, 2, {"buckets": BUCKETS}, r"buckets was given without num_buckets"),
        (GOOD, 2, {"buckets": BUCKETS.long(), "num_buckets": 2}, r"buckets has dtype int64; allowed: int32"),
        (GOOD, 2, {"buckets": BUCKETS[:1], "num_buckets": 2}, r"buckets must have shape \[\*, seq_len\] = \(2, 8\)"),
        (GOOD, 2, {"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens has 3 entries; .* scores give 2"),
        (GOOD, 2, {"seq_lens": torch.ones(2)}, r"seq_lens has dtype float32; allowed: int32, int64"),
    ],
)
def test_refuses(scores, budget, arguments, message, backend, device):
    moved = scores.to(device) if isinstance(scores, torch.Tensor) else scores
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        select_tokens(moved, budget, **options, backend=backend)
