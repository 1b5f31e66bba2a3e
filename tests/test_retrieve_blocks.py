# SPDX-License-Identifier: Apache-2.0
"""`retrieve_blocks` against the published rules, written as loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, retrieve_blocks, summarize_blocks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("retrieve_blocks"))
RULES = [("mean", "query"), ("mean", "softmax"), ("minmax", "query"), ("minmax", "softmax"), ("mass", "softmax")]
each_rule = pytest.mark.parametrize(("kind", "pooling"), RULES)
BLOCK = 5

# batch, num_queries, seq_len, num_qo_heads, num_kv_heads, head_dim
SHAPES = [
    pytest.param((2, 20, 160, 28, 4, 128), id="7B"),
    pytest.param((3, 7, 97, 14, 2, 64), id="0.5B"),
    pytest.param((2, 1, 97, 28, 4, 128), id="last_query"),
    pytest.param((1, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((2, 3, 41, 9, 3, 17), id="group_3"),
    pytest.param((2, 4, 53, 3, 3, 5), id="group_1"),
]


def inputs(shape, kind, device, dtype=torch.float32):
    """Question queries, and what `keys` is for this kind."""
    batch, num_queries, seq_len, num_qo_heads, num_kv_heads, head_dim = shape
    q = torch.randn(batch, num_queries, num_qo_heads, head_dim, device=device).to(dtype)
    k = torch.randn(batch, seq_len, num_kv_heads, head_dim, device=device).to(dtype)
    return q, k if kind == "mass" else summarize_blocks(k, block_size=BLOCK, kind=kind, backend="reference")


def naive_scores(q, keys, kind, pooling, valid, scale):
    """Scores of the first blocks of one sequence, [H, blocks], float64; `valid` entries of `keys` count."""
    q, keys = q.double(), keys[:valid].double()
    num_kv_heads = keys.shape[-2]
    group = q.shape[1] // num_kv_heads
    blocks = math.ceil(valid / BLOCK) if kind == "mass" else valid
    result = torch.zeros(num_kv_heads, blocks, dtype=torch.float64, device=q.device)
    for row in [q.mean(0)] if pooling == "query" else q:
        for head, query in enumerate(row):
            h = head // group
            if kind == "minmax":
                logits = torch.maximum(query * keys[:, 0, h], query * keys[:, 1, h]).sum(-1)
            else:
                logits = keys[:, h] @ query
            if pooling == "softmax":
                logits = (logits * scale).softmax(0)
            if kind == "mass":
                logits = torch.stack([part.sum() for part in logits.split(BLOCK)])
            result[h] += logits
    return result


def expect_best(table, count, scores, width, always):
    """`table` holds the `always` blocks and the best others; blocks of almost equal score may stand for one another."""
    kept = table[: int(count)].tolist()
    assert table[int(count) :].tolist() == [-1] * (len(table) - int(count))
    assert len(kept) == width and kept == sorted(set(kept)) and set(always) <= set(kept) <= set(range(len(scores)))
    rest = [b for b in range(len(scores)) if b not in always]
    worst_kept = min((scores[b] for b in rest if b in kept), default=math.inf)
    best_left = max((scores[b] for b in rest if b not in kept), default=-math.inf)
    assert worst_kept >= best_left - 1e-4 * max(abs(s) for s in scores)


@each_backend
@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_rule(shape, dtype, kind, pooling, backend, device):
    q, keys = inputs(shape, kind, device, dtype)
    valid = keys.shape[1]
    blocks = math.ceil(shape[2] / BLOCK)
    selected = max(1, blocks // 3)
    options = {"kind": kind, "pooling": pooling, "num_selected": selected, "backend": backend}
    options["block_size"] = BLOCK if kind == "mass" else None
    table, counts = retrieve_blocks(q, keys, **options)
    assert table.dtype == counts.dtype == torch.int32 and table.shape == (shape[0], selected)
    per_head, head_counts = retrieve_blocks(q, keys, per_head=True, **options)
    assert per_head.shape == (shape[0], shape[4], selected) and head_counts.shape == (shape[0], shape[4])
    for b in range(shape[0]):
        scores = naive_scores(q[b], keys[b], kind, pooling, valid, shape[5] ** -0.5)
        expect_best(table[b], counts[b], scores.sum(0).tolist(), selected, [])
        for h in range(shape[4]):
            expect_best(per_head[b, h], head_counts[b, h], scores[h].tolist(), selected, [])


@each_backend
def test_rekv(backend, device):
    # ReKV's own words: KV heads repeated to query heads, heads flattened to one vector, queries averaged, dot, top-k.
    q, keys = inputs((1, 9, 200, 14, 2, 64), "mean", device)
    flat = keys[0].repeat_interleave(7, dim=1).flatten(1)  # [blocks, 14 * 64]
    best = (flat @ q[0].mean(0).flatten()).topk(8).indices.sort().values
    table, _ = retrieve_blocks(q, keys, num_selected=8, backend=backend)
    assert torch.equal(table[0].long(), best)


@each_backend
@each_rule
@pytest.mark.parametrize("ratio", [None, 0.4, 1e-9, 1.0])
def test_ragged_sequences_sinks_recent_and_ratio(ratio, kind, pooling, backend, device):
    shape = (6, 3, 60, 6, 2, 16)
    q, keys = inputs(shape, kind, device)
    unit = BLOCK if kind == "mass" else 1
    blocks = [0, 1, 3, 7, 12, 12]
    lens = [n * unit for n in blocks[:-1]] + [1000]
    if kind == "mass":
        lens[2] -= 2  # the last block of a sequence may be partial
    for row, length in enumerate(lens):
        keys[row, length:] = torch.nan if row % 2 else torch.inf
    table, counts = retrieve_blocks(
        q, keys, kind=kind, pooling=pooling, num_selected=6, ratio=ratio, num_sink_blocks=1, num_recent_blocks=2,
        block_size=BLOCK if kind == "mass" else None, seq_lens=torch.tensor(lens, device=device), backend=backend,
    )  # fmt: skip
    for b, n in enumerate(blocks):
        always = {block for block in (0, n - 2, n - 1) if 0 <= block < n}
        width = min(6, n) if ratio is None else min(6, n, max(3, math.ceil(ratio * n)))
        if n == 0:
            assert table[b].tolist() == [-1] * 6 and counts[b] == 0
        else:
            scores = naive_scores(q[b], keys[b], kind, pooling, min(lens[b], keys.shape[1]), 0.25)
            expect_best(table[b], counts[b], scores.sum(0).tolist(), width, always)


@each_backend
@pytest.mark.parametrize(("ratio", "blocks", "count"), [(0.07, 100, 7), (0.4, 5, 2), (0.1, 3, 1), (0.3, 10, 3)])
def test_ratio_is_not_rounded_up_by_floating_point(ratio, blocks, count, backend, device):
    keys = torch.randn(1, blocks, 1, 4, device=device)
    _, counts = retrieve_blocks(keys[:, :1], keys, num_selected=blocks, ratio=ratio, backend=backend)
    assert counts.tolist() == [count]


@each_backend
@each_rule
def test_ties_go_to_the_earliest_block(kind, pooling, backend, device):
    # 64 tokens: each has a share of exactly 1/64, so that blocks tie in whatever order the shares are added.
    q, keys = inputs((1, 3, 64, 6, 2, 16), kind, device)
    table, _ = retrieve_blocks(
        q, torch.zeros_like(keys), kind=kind, pooling=pooling, num_selected=5, num_recent_blocks=1,
        block_size=BLOCK if kind == "mass" else None, backend=backend,
    )  # fmt: skip
    assert table.tolist() == [[0, 1, 2, 3, 12]]


@each_backend
def test_nan_blocks_are_never_chosen_but_as_sink_or_recent(backend, device):
    q, keys = inputs((1, 3, 30, 2, 1, 8), "mean", device)
    keys[0, [0, 2, 4]] = torch.nan
    table, counts = retrieve_blocks(q, keys, num_selected=6, num_sink_blocks=1, backend=backend)
    assert table.tolist() == [[0, 1, 3, 5, -1, -1]] and counts.tolist() == [4]
    table, counts = retrieve_blocks(q, keys, pooling="softmax", num_selected=6, num_recent_blocks=1, backend=backend)
    assert table.tolist() == [[5, -1, -1, -1, -1, -1]]  # a softmax over a NaN is NaN everywhere


@each_backend
@pytest.mark.parametrize("width", [64, 1700])
def test_many_blocks_with_equal_scores(width, backend, device):
    # Scores are small integers, so exact, and most are equal: what is taken of those is decided by their numbers.
    q = torch.randint(-2, 3, (2, 1, 4, 4), device=device).float()
    keys = torch.randint(-2, 3, (2, 5001, 2, 4), device=device).float()
    keys[0, 5::97] = torch.nan
    for options in ({}, {"per_head": True}, {"num_sink_blocks": 1, "num_recent_blocks": 2, "ratio": 0.3}):
        options |= {"num_selected": width, "seq_lens": torch.tensor([5001, 4200], device=device)}
        expected = retrieve_blocks(q, keys, **options, backend="reference")
        for mine, right in zip(retrieve_blocks(q, keys, **options, backend=backend), expected, strict=True):
            assert torch.equal(mine, right)


@each_backend
@pytest.mark.skipif(kit.INTERPRETED, reason="slow, and no other kernel in Triton")
def test_more_blocks_than_shared_memory_holds(backend, device):
    blocks = 800_000 if device == "cuda" else 40_000  # 16 thread blocks share a row on Hopper
    q, keys = torch.ones(1, 1, 1, 1, device=device), torch.randint(-9, 10, (1, blocks, 1, 1), device=device).float()
    table, count = retrieve_blocks(q, keys, num_selected=7000, num_recent_blocks=1, backend=backend)
    expected, _ = retrieve_blocks(q, keys, num_selected=7000, num_recent_blocks=1, backend="reference")
    assert torch.equal(table, expected) and count.tolist() == [7000]


@each_backend
@pytest.mark.parametrize("kind", ["mean", "mass"])
def test_many_blocks_share_a_softmax(kind, backend, device):
    q, keys = torch.randn(1, 1, 2, 4, device=device), torch.randn(1, 4500, 2, 4, device=device) * 3
    options = {"kind": kind, "pooling": "softmax", "num_selected": 40, "num_recent_blocks": 1, "backend": backend}
    options["block_size"] = 1 if kind == "mass" else None
    table, counts = retrieve_blocks(q, keys, **options)
    scores = naive_scores(q[0], keys[0], "mean", "softmax", 4500, 0.5).sum(0)
    expect_best(table[0], counts[0], scores.tolist(), 40, [4499])
    keys[0, 123, 1, 2] = torch.nan
    table, counts = retrieve_blocks(q, keys, **options)
    assert table[0].tolist() == [4499] + [-1] * 39 and counts.tolist() == [1]


@each_backend
def test_wide_table_has_every_block(backend, device):
    q, keys = inputs((2, 3, 60, 6, 2, 16), "mean", device)
    table, counts = retrieve_blocks(q, keys, num_selected=20, per_head=True, backend=backend)
    assert (table == torch.tensor([*range(12)] + [-1] * 8, device=device)).all() and (counts == 12).all()


@each_backend
def test_softmax_pooling_finds_what_the_mean_query_hides(backend, device):
    # Two words ask for opposite things: their mean is zero, and the best blocks are lost.
    keys = torch.randn(1, 8, 1, 16, device=device) * 0.1
    keys[0, 5], keys[0, 6] = 3.0, -3.0
    q = torch.stack((torch.ones(1, 16), -torch.ones(1, 16)))[None].to(device)
    options = {"num_selected": 2, "backend": backend}
    assert retrieve_blocks(q, keys, pooling="softmax", **options)[0].tolist() == [[5, 6]]
    assert retrieve_blocks(q, keys, pooling="query", **options)[0].tolist() == [[0, 1]]


@each_backend
@each_rule
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts_and_leading_dimensions(layout, kind, pooling, backend, device):
    q, keys = inputs((6, 3, 60, 6, 2, 16), kind, device)
    options = {"kind": kind, "pooling": pooling, "num_selected": 4, "backend": backend}
    options["block_size"] = BLOCK if kind == "mass" else None
    expected, _ = retrieve_blocks(q, keys, **options)
    assert torch.equal(retrieve_blocks(kit.LAYOUTS[layout](q), kit.LAYOUTS[layout](keys), **options)[0], expected)
    table, counts = retrieve_blocks(q.unflatten(0, (2, 3)), keys.unflatten(0, (2, 3)), **options)
    assert torch.equal(table.flatten(0, 1), expected) and counts.shape == (2, 3)
    table, count = retrieve_blocks(q[2], keys[2], **options)
    assert torch.equal(table, expected[2]) and count.shape == ()


Q, MEANS, BOUNDS = torch.randn(2, 3, 6, 8), torch.randn(2, 10, 2, 8), torch.randn(2, 10, 2, 2, 8)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "max"}, r"kind='max' is unknown; allowed: mean, minmax, mass"),
        ({"pooling": "sum"}, r"pooling='sum' is unknown; allowed: query, softmax"),
        ({"kind": "mass", "block_size": 2, "pooling": "query"}, r"pooling='query' is unknown; allowed: softmax"),
        ({"kind": "mass"}, r"block_size=None with kind='mass': it must be given with 'mass', and only then"),
        ({"block_size": 4}, r"block_size=4 with kind='mean': it must be given with 'mass', and only then"),
        ({"kind": "mass", "block_size": 0}, r"block_size=0 must be at least 1"),
        ({"kind": "mass", "block_size": 2, "q": Q.half()}, r"q has dtype float16; allowed: float32"),
        ({"kind": "minmax"}, r"keys must have at least 4 dimensions; its shape is \(10, 2, 8\)"),
        ({"kind": "minmax", "keys": BOUNDS.repeat(1, 1, 2, 1, 1)}, r"keys must have shape .* = \(2, 10, 2, 2, 8\)"),
        ({"keys": MEANS.double()}, r"keys has dtype float64; allowed: float32, float16, bfloat16"),
        ({"keys": MEANS[:, :0]}, r"keys is empty"),
        ({"q": Q[:1]}, r"q must have shape \[\*, num_queries, num_qo_heads, head_dim\] = \(2, 3, 6, 8\), not \(1,"),
        ({"q": Q[:, :, :3]}, r"q has 3 heads; allowed: multiples of num_kv_heads = 2"),
        ({"q": Q.long()}, r"q has dtype int64; allowed: float32"),
        ({"num_selected": 0}, r"num_selected=0 must be at least 1"),
        ({"num_sink_blocks": -1}, r"num_sink_blocks=-1 must be at least 0"),
        ({"num_recent_blocks": -1}, r"num_recent_blocks=-1 must be at least 0"),
        ({"num_sink_blocks": 2, "num_recent_blocks": 3}, r"num_selected=4 must be at least num_sink_blocks .* = 5"),
        ({"ratio": 0.0}, r"ratio=0.0 must be above 0 and at most 1"),
        ({"ratio": 1.5}, r"ratio=1.5 must be above 0 and at most 1"),
        ({"sm_scale": -1.0}, r"sm_scale=-1.0 must be positive and finite"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens has 3 entries; .* keys give 2"),
    ],
)
def test_refuses(change, message, backend, device):
    keys = MEANS[0] if change == {"kind": "minmax"} else MEANS
    arguments = {"q": Q, "keys": keys, "num_selected": 4, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        retrieve_blocks(**moved, backend=backend)
