# SPDX-License-Identifier: Apache-2.0
"""`merge_states` against one softmax over all keys."""

from __future__ import annotations

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, merge_states

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("merge_states"))


def attend(logits, values):
    """logits [Q, H, K], values [K, H, D] -> out, lse in float64."""
    return torch.einsum("qhk,khd->qhd", logits.softmax(-1), values), logits.logsumexp(-1)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(
    ("parts", "queries", "heads", "dim"), [(2, 33, 28, 128), (5, 1, 14, 64), (1, 1, 1, 1), (3, 7, 3, 17)]
)
def test_parts_make_the_whole(parts, queries, heads, dim, dtype, backend, device):
    logits = torch.randn(queries, heads, 12 * parts, device=device, dtype=torch.float64) * 5
    values = torch.randn(12 * parts, heads, dim, device=device, dtype=torch.float64)
    pieces = [attend(x, y) for x, y in zip(logits.split(12, -1), values.split(12), strict=True)]
    out, lse = merge_states(
        torch.stack([out for out, _ in pieces]).to(dtype), torch.stack([x for _, x in pieces]).float(), backend=backend
    )
    exact_out, exact_lse = attend(logits, values)
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), exact_out, rtol=eps, atol=eps)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@each_backend
def test_empty_parts_are_not_read(backend, device):
    outs, lses = torch.randn(3, 4, 2, 8, device=device), torch.randn(3, 4, 2, device=device)
    outs[1], lses[1] = torch.nan, -torch.inf
    out, lse = merge_states(outs, lses, backend=backend)
    expected = merge_states(outs[[0, 2]], lses[[0, 2]], backend=backend)
    torch.testing.assert_close((out, lse), expected)
    out, lse = merge_states(outs, torch.full_like(lses, -torch.inf), backend=backend)
    assert not out.any() and (lse == -torch.inf).all()


@each_backend
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_lse(size, backend, device):
    outs, lses = torch.randn(2, 3, 1, 8, device=device), torch.full((2, 3, 1), size, device=device)
    out, lse = merge_states(outs, lses, backend=backend)
    torch.testing.assert_close(out, outs.mean(0))
    torch.testing.assert_close(lse, lses[0] + torch.tensor(2.0).log().to(device))


@each_backend
def test_one_part_order_and_nesting(backend, device):
    outs, lses = torch.randn(3, 5, 2, 8, device=device), torch.randn(3, 5, 2, device=device) * 4
    torch.testing.assert_close(merge_states(outs[:1], lses[:1], backend=backend), (outs[0], lses[0]))
    whole = merge_states(outs, lses, backend=backend)
    torch.testing.assert_close(merge_states(outs.flip(0), lses.flip(0), backend=backend), whole)
    first = merge_states(outs[:2], lses[:2], backend=backend)
    pairs = (torch.stack((x, y[2])) for x, y in zip(first, (outs, lses), strict=True))
    torch.testing.assert_close(merge_states(*pairs, backend=backend), whole, rtol=1e-5, atol=1e-6)


@each_backend
def test_strided(backend, device):
    outs, lses = torch.randn(4, 2, 3, 8, device=device).transpose(0, 1), torch.randn(3, 4, 2, device=device)
    lses = lses.permute(2, 1, 0)
    expected = merge_states(outs.contiguous(), lses.contiguous(), backend=backend)
    torch.testing.assert_close(merge_states(outs, lses, backend=backend), expected)
    assert merge_states(outs, lses, backend=backend)[0].is_contiguous()


OUTS, LSES = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)


@each_backend
@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (OUTS[0], LSES, r"outs must have 4 dimensions; its shape is \(3, 4, 8\)"),
        (OUTS.double(), LSES, r"outs has dtype float64; allowed: float32, float16, bfloat16"),
        (OUTS[:0], LSES[:0], r"outs is empty"),
        (OUTS, LSES[:1], r"lses must have shape \[num_parts, total_q, num_qo_heads\] = \(2, 3, 4\), not \(1, 3, 4\)"),
        (OUTS, LSES.half(), r"lses has dtype float16; allowed: float32"),
    ],
)
def test_refuses(outs, lses, message, backend, device):
    with pytest.raises(ArgumentError, match=message):
        merge_states(outs.to(device), lses.to(device), backend=backend)
