# SPDX-License-Identifier: Apache-2.0
"""`compact_tokens` against row-by-row copies."""

from __future__ import annotations

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, BackendError, compact_tokens

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("compact_tokens"))
DTYPES = [*kit.DTYPES, torch.float8_e4m3fn, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def kept(lead, seq_len, n, device="cpu"):
    """Random keep-sets of any size up to n: ascending, -1 padded; the first row is full and the last one empty."""
    indices = torch.full((*lead, n), -1, dtype=torch.int32)
    rows = indices.view(-1, n)
    for number, row in enumerate(rows):
        count = n if number == 0 else 0 if number == len(rows) - 1 else int(torch.randint(n + 1, ()))
        row[:count] = torch.randperm(seq_len)[:count].sort().values
    return indices.to(device)


def moved(tensor, indices, per_head=False):
    """What `tensor` [B, L, (H,) ...] should become, by loops."""
    result = tensor.clone()
    for b, row in enumerate(indices.tolist()):
        for h, head in enumerate(row if per_head else [row]):
            where = (slice(None), h) if per_head else (slice(None),)
            for j, index in enumerate(head):
                if 0 <= index < tensor.shape[1]:
                    result[b][where][j] = tensor[b][where][index]
    return result


def data(shape, dtype, device):
    x = torch.randint(0, 2 if dtype is torch.bool else 100, shape, device=device)
    return x.to(torch.float32).to(dtype) if dtype.is_floating_point else x.to(dtype)


def same(a, b):
    assert torch.equal(a.float() if a.itemsize == 1 else a, b.float() if b.itemsize == 1 else b)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 37, 2, 64), (3, 37), (2, 1, 3, 5), (5, 13, 1, 1), (2, 64, 4, 128)])
def test_rows_move_to_the_front(shape, dtype, backend, device):
    x = data(shape, dtype, device)
    indices = kept(shape[:1], shape[1], max(1, shape[1] * 2 // 3), device)
    expected = moved(x, indices)
    assert compact_tokens([x], indices, backend=backend) is None
    same(x, expected)


@each_backend
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_per_head(heads, backend, device):
    k, weights = torch.randn(3, 29, heads, 16, device=device), torch.randn(3, 29, heads, device=device)
    indices = kept((3, heads), 29, 17, device)
    expected = [moved(x, indices, per_head=True) for x in (k, weights)]
    compact_tokens([k, weights], indices, per_head=True, backend=backend)
    assert torch.equal(k, expected[0]) and torch.equal(weights, expected[1])


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_views_are_updated_through(layout, backend, device):
    k = torch.randn(2, 21, 2, 64, device=device)
    view = kit.LAYOUTS[layout](k)
    storage = view.untyped_storage().data_ptr()
    indices = kept((2,), 21, 9, device)
    expected = moved(k, indices)
    compact_tokens([view], indices, backend=backend)
    assert view.untyped_storage().data_ptr() == storage
    assert torch.equal(view, expected)


@each_backend
def test_transformers_layout_and_neighbours(backend, device):
    cache = torch.randn(2, 3, 4, 40, 16, device=device)  # [layers, streams, heads, slots, head_dim], 32 of 40 in use
    before, indices = cache.clone(), kept((2, 3), 32, 20, device)
    compact_tokens((cache[..., :32, :].transpose(2, 3),), indices, backend=backend)
    used = before[..., :32, :].transpose(2, 3).flatten(0, 1)
    assert torch.equal(cache[..., :32, :].transpose(2, 3).flatten(0, 1), moved(used, indices.flatten(0, 1)))
    assert torch.equal(cache[..., 32:, :], before[..., 32:, :])


@each_backend
def test_all_layers_of_7b_at_once(backend, device):
    k, v = torch.randn(2, 28, 600, 4, 128, device=device).bfloat16().unbind(0)
    positions = torch.arange(600, dtype=torch.int32, device=device).repeat(28, 1)
    indices = kept((28,), 600, 400, device)
    expected = [moved(x, indices) for x in (k, v, positions)]
    compact_tokens([k, v, positions], indices, backend=backend)
    for x, y in zip((k, v, positions), expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(positions[0, :400], indices[0])


@each_backend
@pytest.mark.parametrize(
    ("shape", "dtype", "n"),
    [
        pytest.param((16, 560, 4, 64), torch.float32, 520, id="64 bytes"),
        pytest.param((96, 300, 2, 68), torch.bfloat16, 260, id="128 bytes, the last of 16"),
        pytest.param((192, 150, 2, 64), torch.bfloat16, 130, id="256 bytes"),
        pytest.param((6, 300, 2, 64), torch.bfloat16, 200, id="too few"),
    ],
)
def test_one_block_moves_whole_columns(shape, dtype, n, backend, device):
    """In CUDA, of the width in the name, and in two steps here. With too few columns blocks wait for each other."""
    x = data(shape, dtype, device)
    positions = torch.arange(shape[1], dtype=torch.int32, device=device).repeat(shape[0], 1)
    indices = kept(shape[:1], shape[1], n, device)
    expected = [moved(tensor.cpu(), indices) for tensor in (x, positions)]
    compact_tokens([positions, x], indices, backend=backend)
    assert torch.equal(x.cpu(), expected[0]) and torch.equal(positions.cpu(), expected[1])


@each_backend
def test_indices_outside_are_padding(backend, device):
    x = torch.arange(10.0, device=device)
    compact_tokens([x], torch.tensor([2, 5, 10, -7, 2**31 - 1], dtype=torch.int32, device=device), backend=backend)
    assert x.tolist() == [2, 5, 2, 3, 4, 5, 6, 7, 8, 9]


@each_backend
def test_everything_kept_is_identity(backend, device):
    x = torch.randn(2, 7, 3, device=device)
    before = x.clone()
    compact_tokens([x], torch.arange(7, dtype=torch.int32, device=device).repeat(2, 1), backend=backend)
    assert torch.equal(x, before)


@each_backend
def test_special_values_move_bit_by_bit(backend, device):
    x = torch.tensor([0.0, torch.nan, -0.0, -torch.inf, 1.0], device=device)
    compact_tokens([x], torch.tensor([1, 2, 3], dtype=torch.int32, device=device), backend=backend)
    assert (
        x.view(torch.int32).tolist()
        == torch.tensor([torch.nan, -0.0, -torch.inf, -torch.inf, 1.0]).view(torch.int32).tolist()
    )


X = torch.randn(2, 8, 3, 4)
ROWS = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("tensors", "indices", "per_head", "message"),
    [
        ([], ROWS, False, r"tensors must be a list of at least one torch.Tensor, not \[\]"),
        (X, ROWS, False, r"tensors must be a list of at least one torch.Tensor, not tensor"),
        ([X, 1], ROWS, False, r"tensors\[1\] must be a torch.Tensor, not int"),
        ([X], ROWS.long(), False, r"indices has dtype int64; allowed: int32"),
        ([X], ROWS[:, :0], False, r"indices is empty"),
        ([X, X[:1].clone()], ROWS, False, r"tensors\[1\] must have shape \[\*, seq_len, ...\] = \(2, 8, 3, 4\)"),
        ([X, X[:, :7].clone()], ROWS, False, r"tensors\[1\] must have shape .* = \(2, 8, 3, 4\), not \(2, 7, 3, 4\)"),
        ([X, torch.zeros(2)], ROWS, False, r"tensors\[1\] must have at least 2 dimensions; its shape is \(2,\)"),
        ([X], ROWS.repeat(1, 5), False, r"indices names 10 tokens of each row; tensors\[0\] has seq_len = 8"),
        ([X], ROWS[:, None].repeat(1, 2, 1), True, r"tensors\[0\] must have shape \[\*, seq_len, num_kv_heads, ...\]"),
    ],
)
def test_refuses_and_writes_nothing(tensors, indices, per_head, message, backend, device):
    before = X.clone()
    place = [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors] if isinstance(tensors, list) else X
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in place]
    with pytest.raises(ArgumentError, match=message):
        compact_tokens(place, indices.to(device), per_head=per_head, backend=backend)
    for x, copy in zip(place, copies, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x, copy)
    assert torch.equal(X, before)


@each_backend
def test_refuses_leading_dimensions_that_do_not_collapse(backend, device):
    x = torch.randn(3, 2, 8, 4, device=device).transpose(0, 1)
    with pytest.raises(ArgumentError, match=r"tensors\[0\]: its leading dimensions \(2, 3\) .* do not collapse"):
        compact_tokens([x], torch.zeros(2, 3, 1, dtype=torch.int32, device=device), backend=backend)


def test_missing_backend_writes_nothing():
    x = X.clone()
    with pytest.raises(BackendError, match="backend='cuda' cannot run compact_tokens on cpu tensors"):
        compact_tokens([x], ROWS, backend="cuda")
    assert torch.equal(x, X)


@each_backend
def test_refuses_expanded_dimensions(backend, device):
    """Several elements of such a view are one in memory: it cannot be written in place."""
    x = X.to(device)
    with pytest.raises(ArgumentError, match=r"tensors\[1\] has strides .*: expanded dimensions"):
        compact_tokens([x, x[..., :1].expand(x.shape)], ROWS.to(device), backend=backend)
    assert torch.equal(x.cpu(), X)
