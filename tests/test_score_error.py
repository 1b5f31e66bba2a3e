# SPDX-License-Identifier: Apache-2.0
"""`score_tokens` may be off by at most twice as much as plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kit
from livevlm_kernels import score_tokens

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("score_tokens"))
NUM_QUERIES, LENGTH = (16, 150) if kit.SLOW else (64, 600)
POSITIONS = 30_000


def rotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as transformers writes it, in the dtype of `k`; `cos` and `sin` are [tokens, head_dim / 2]."""
    cos, sin = (torch.cat((x, x), -1).to(k.dtype)[:, None] for x in (cos, sin))
    low, high = k.chunk(2, -1)
    return k * cos + torch.cat((-high, low), -1) * sin


def attention(q: Tensor, k: Tensor, softmax_dtype: torch.dtype) -> Tensor:
    """Mean attention [heads, tokens] in float64, as transformers' eager attention computes it before that."""
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], 1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = logits.softmax(-1, dtype=softmax_dtype).to(q.dtype)
    return weights.double().mean(2).unflatten(1, (-1, 7)).mean(2)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64)])
def test_error_against_float64(num_qo_heads, num_kv_heads, head_dim, rope, dtype, backend, device):
    k = torch.randn(2, LENGTH, num_kv_heads, head_dim)
    q = torch.randn(2, NUM_QUERIES, num_qo_heads, head_dim)
    k[..., ::16] *= 4  # real models have a few channels with large keys,
    k[:, 0, :, -1], q[..., -1] = 20, 1.5  # and a first token that takes some of the attention of all queries
    q, k = q.to(device, dtype), k.to(device, dtype)
    positions = torch.arange(POSITIONS - LENGTH, POSITIONS, device=device)
    angle = torch.arange(POSITIONS)[:, None] * 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    cache = torch.cat((angle.cos(), angle.sin()), 1).to(device)
    options = {"positions": positions.repeat(2, 1), "cos_sin_cache": cache} if rope else {}

    cos, sin = cache[positions].chunk(2, -1)
    exact = attention(q.double(), rotate(k.double(), cos, sin) if rope else k.double(), torch.float64)
    plain = attention(q, rotate(k, cos, sin) if rope else k, torch.float32)
    allowed = 2 * (plain - exact).abs().max() + 1e-7
    assert exact[..., 0].mean() > 0.01
    error = (score_tokens(q, k, **options, backend=backend) - exact).abs().max()
    assert error <= allowed
