# SPDX-License-Identifier: Apache-2.0
"""`merge_tokens` against means taken group by group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kit
from livevlm_kernels import ArgumentError, merge_tokens
from livevlm_kernels.reference import _chunks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("merge_tokens"))

# batch, seq_len, num_kv_heads, head_dim, rows of the result
SHAPES = [
    pytest.param((2, 4 * 196, 4, 128, 4), id="7B"),
    pytest.param((3, 150, 2, 64, 37), id="0.5B"),
    pytest.param((1, 1, 1, 1, 1), id="ones"),
    pytest.param((2, 31, 3, 17, 7), id="odd"),
]
EPS = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def tokens(shape, device, dtype=torch.float32):
    return torch.randn(2, *shape[:4], device=device).to(dtype).unbind(0)


def naive(k, v, groups, num_groups, weight=None, lens=None):
    """Weighted means in float64, one token after another."""
    outs = [torch.zeros(k.shape[0], num_groups, *k.shape[2:], dtype=torch.float64, device=k.device) for _ in range(2)]
    size = torch.zeros(k.shape[0], num_groups, dtype=torch.float64, device=k.device)
    for b in range(k.shape[0]):
        for token in range(k.shape[1] if lens is None else lens[b]):
            group = int(groups[b, token])
            if 0 <= group < num_groups:
                w = 1.0 if weight is None else float(weight[b, token])
                size[b, group] += w
                for out, x in zip(outs, (k, v), strict=True):
                    out[b, group] += w * x[b, token].double()
    for out in outs:
        out /= torch.where(size == 0, 1, size)[..., None, None]
    return *outs, size


def close(results, expected, dtype=torch.float32):
    *outs, size = results
    assert size.dtype == torch.float32 and all(out.dtype == dtype for out in outs)
    torch.testing.assert_close(size.double(), expected[2], rtol=1e-5, atol=1e-6)
    for out, exact in zip(outs, expected, strict=False):
        torch.testing.assert_close(out.double(), exact, rtol=EPS[dtype], atol=3e-6)


def nearest(k, indices, lens=None):
    """Row of the survivor that each token of one sequence belongs to, by the cosine of whole keys."""
    flat = k.flatten(1).double()
    valid = len(flat) if lens is None else lens
    rows = [j for j, i in enumerate(indices) if 0 <= i < valid]
    groups = []
    for token in range(len(flat)):
        own = [j for j in rows if indices[j] == token]
        cosine = [float(F.cosine_similarity(flat[token], flat[indices[j]], dim=0)) for j in rows]
        groups.append(own[0] if own else rows[cosine.index(max(cosine))] if rows else -1)
    return groups


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_groups(shape, dtype, backend, device):
    k, v = tokens(shape, device, dtype)
    groups = torch.randint(-2, shape[4] + 2, shape[:2], dtype=torch.int32, device=device)
    results = merge_tokens(k, v, groups=groups, num_groups=shape[4], backend=backend)
    close(results, naive(k, v, groups, shape[4]), dtype)


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_and_weights(shape, backend, device):
    k, v = tokens(shape, device)
    groups = torch.randint(0, shape[4], shape[:2], dtype=torch.int32, device=device)
    sizes, weights = torch.rand(2, *shape[:2], device=device) * 5
    for given in ({"sizes": sizes}, {"weights": weights}, {"sizes": sizes, "weights": weights}):
        weight = torch.stack(list(given.values())).double().prod(0)
        results = merge_tokens(k, v, groups=groups, num_groups=shape[4], **given, backend=backend)
        close(results, naive(k, v, groups, shape[4], weight))
        torch.testing.assert_close(results[2].sum(1).double(), weight.sum(1), rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_survivors_take_in_the_most_similar(shape, backend, device):
    k, v = tokens(shape, device)
    indices = torch.full((shape[0], shape[4]), -1, dtype=torch.int32)
    for b in range(shape[0]):
        n = shape[4] - b  # later rows are padded
        indices[b, :n] = torch.randperm(shape[1])[:n].sort().values
    sizes = torch.rand(shape[:2], device=device) + 0.5
    expected = torch.tensor([nearest(k[b], indices[b].tolist()) for b in range(shape[0])])
    results = merge_tokens(k, v, indices=indices.to(device), sizes=sizes, backend=backend)
    close(results, naive(k, v, expected, shape[4], sizes))
    torch.testing.assert_close(results[2].sum(1), sizes.sum(1))  # nothing is lost


@each_backend
def test_ragged_sequences_over_garbage(backend, device):
    lens = [0, 1, 20, 21]
    k, v = tokens((4, 21, 2, 16), device)
    weights = torch.rand(4, 21, device=device)
    groups = torch.randint(0, 5, (4, 21), dtype=torch.int32, device=device)
    survivors = torch.tensor([0, 3, 8, 20, -1], dtype=torch.int32, device=device).repeat(4, 1)
    nearests = torch.tensor([nearest(k[b], survivors[b].tolist(), lens[b]) for b in range(4)])
    for row, length in enumerate(lens):
        k[row, length:], v[row, length:], weights[row, length:] = torch.nan, torch.inf, torch.nan
        groups[row, length:] = row
    options = {"weights": weights, "seq_lens": torch.tensor(lens, device=device), "backend": backend}
    close(merge_tokens(k, v, groups=groups, num_groups=5, **options), naive(k, v, groups, 5, weights, lens))
    close(merge_tokens(k, v, indices=survivors, **options), naive(k, v, nearests, 5, weights, lens))


@each_backend
def test_dropped_tokens_and_empty_rows(backend, device):
    k, v = tokens((1, 6, 1, 4), device)
    k[0, 4], v[0, 5] = torch.nan, torch.inf
    groups = torch.tensor([[2, 2, 0, 0, -1, 9]], dtype=torch.int32, device=device)
    weights = torch.tensor([[1.0, 3.0, 0.0, 0.0, 1.0, 1.0]], device=device)
    k_out, v_out, sizes = merge_tokens(k, v, groups=groups, num_groups=4, weights=weights, backend=backend)
    assert sizes.tolist() == [[0, 0, 4, 0]]
    assert not k_out[0, [0, 1, 3]].any() and not v_out[0, [0, 1, 3]].any()
    torch.testing.assert_close(k_out[0, 2], (k[0, 0] + 3 * k[0, 1]) / 4)


@each_backend
def test_merging_twice_equals_merging_once(backend, device):
    k, v = tokens((2, 60, 2, 16), device)
    weights = torch.rand(2, 60, device=device)
    fine = torch.randint(0, 20, (2, 60), dtype=torch.int32, device=device)
    coarse = torch.randint(0, 5, (20,), dtype=torch.int32, device=device)
    once = merge_tokens(k, v, groups=coarse[fine.long()], num_groups=5, weights=weights, backend=backend)
    k_mid, v_mid, sizes = merge_tokens(k, v, groups=fine, num_groups=20, weights=weights, backend=backend)
    twice = merge_tokens(k_mid, v_mid, groups=coarse.repeat(2, 1), num_groups=5, sizes=sizes, backend=backend)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_backend
def test_all_survive_and_none_survives(backend, device):
    k, v = tokens((2, 9, 2, 8), device, torch.bfloat16)
    everyone = torch.arange(9, dtype=torch.int32, device=device).repeat(2, 1)
    k_out, v_out, sizes = merge_tokens(k, v, indices=everyone, backend=backend)
    assert torch.equal(k_out, k) and torch.equal(v_out, v) and (sizes == 1).all()
    k_out, v_out, sizes = merge_tokens(k, v, indices=torch.full_like(everyone, -1), backend=backend)
    assert not k_out.any() and not v_out.any() and not sizes.any()


@each_backend
def test_ties_and_zero_keys_go_to_the_lowest_row(backend, device):
    k = torch.zeros(1, 6, 1, 2, device=device)
    k[0, [1, 3], 0, 0] = 1.0
    k[0, 4, 0, 0] = 5.0  # as similar to both
    survivors = torch.tensor([[1, 3]], dtype=torch.int32, device=device)
    _, _, sizes = merge_tokens(k, k, indices=survivors, backend=backend)
    assert sizes.tolist() == [[5, 1]]  # 0, 2 and 5 have cosine 0 to both


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts_and_leading_dimensions(layout, backend, device):
    k, v = tokens((6, 20, 2, 64), device)
    groups = torch.randint(0, 4, (6, 20), dtype=torch.int32, device=device)
    indices = torch.arange(0, 20, 3, dtype=torch.int32, device=device).repeat(6, 1)
    change = kit.LAYOUTS[layout]
    for given in ({"groups": groups, "num_groups": 4}, {"indices": indices}):
        expected = merge_tokens(k, v, **given, backend=backend)
        results = merge_tokens(change(k), change(v), **given, backend=backend)
        stacked = {name: x.unflatten(0, (2, 3)) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        lead = merge_tokens(k.unflatten(0, (2, 3)), v.unflatten(0, (2, 3)), **stacked, backend=backend)
        for a, b, c in zip(expected, results, lead, strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(a, c.flatten(0, 1))


@each_backend
def test_deterministic(backend, device):
    length = 500 if kit.INTERPRETED else 5000
    k, v = tokens((2, length, 2, 64), device)
    groups = torch.randint(0, 3, (2, length), dtype=torch.int32, device=device)
    first, second = (merge_tokens(k, v, groups=groups, num_groups=3, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("most", [1, 100, 700])
def test_chunks_do_not_change_the_reference(most, monkeypatch):
    k, v = tokens((3, 30, 2, 8), "cpu")
    indices = torch.arange(0, 30, 4, dtype=torch.int32).repeat(3, 1)
    expected = merge_tokens(k, v, indices=indices, backend="reference")
    monkeypatch.setattr(_chunks, "MAX_ELEMENTS", most)
    for a, b in zip(merge_tokens(k, v, indices=indices, backend="reference"), expected, strict=True):
        torch.testing.assert_close(a, b)


K, GROUPS = torch.randn(2, 8, 3, 4), torch.zeros(2, 8, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"exactly one of groups and indices must be given, not none"),
        ({"groups": GROUPS, "indices": GROUPS}, r"exactly one of groups and indices must be given, not both"),
        ({"groups": GROUPS}, r"num_groups=None: it must be given with groups, and only then"),
        ({"indices": GROUPS, "num_groups": 2}, r"num_groups=2: it must be given with groups, and only then"),
        ({"groups": GROUPS, "num_groups": 0}, r"num_groups=0 must be at least 1"),
        ({"groups": GROUPS.long(), "num_groups": 1}, r"groups has dtype int64; allowed: int32"),
        (
            {"groups": GROUPS[:, :3], "num_groups": 1},
            r"groups must have shape \[\*, seq_len\] = \(2, 8\), not \(2, 3\)",
        ),
        ({"indices": GROUPS[0]}, r"indices must have 2 dimensions; its shape is \(8,\)"),
        ({"indices": GROUPS[:1]}, r"indices must have shape \[\*, n\] = \(2, 8\), not \(1, 8\)"),
        ({"indices": GROUPS[:, :0]}, r"indices is empty"),
        ({"indices": GROUPS, "sizes": GROUPS}, r"sizes has dtype int32; allowed: float32"),
        ({"indices": GROUPS, "weights": torch.ones(8)}, r"weights must have shape \[\*, seq_len\] = \(2, 8\)"),
        ({"indices": GROUPS, "seq_lens": GROUPS}, r"seq_lens has 16 entries; the leading dimensions of k give 2"),
        ({"indices": GROUPS, "v": K[:1]}, r"v must have shape .* = \(2, 8, 3, 4\), not \(1, 8, 3, 4\)"),
        ({"indices": GROUPS, "v": K.half()}, r"v has dtype float16; allowed: float32"),
        ({"indices": GROUPS, "k": K.double()}, r"k has dtype float64; allowed"),
    ],
)
def test_refuses(change, message, backend, device):
    arguments = {"k": K, "v": K, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        merge_tokens(**moved, backend=backend)
