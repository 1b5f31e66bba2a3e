# SPDX-License-Identifier: Apache-2.0
"""The ops that read the memory: 41 views, strides past 2^31, and errors no worse than plain PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kit
from livevlm_kernels import block_attention, merge_states, retrieve_blocks
from test_views import VIEWS, view


def cases(op: str):
    return pytest.mark.parametrize(("backend", "device"), kit.cases(op))


def angles(num_positions: int, head_dim: int, device: str) -> torch.Tensor:
    angle = torch.arange(num_positions)[:, None] * 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat((angle.cos(), angle.sin()), 1).to(device)


class Read:
    """A decoding step and a question over a pool of five blocks of 21 slots."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.q = torch.randn(9, 14, 64, device=device).to(dtype)
        self.k, self.v = (torch.randn(5, 21, 2, 64, device=device).to(dtype) for _ in range(2))
        self.options = {
            "block_table": torch.tensor([[3, 0, 4], [1, 2, -1]], dtype=torch.int32, device=device),
            "seq_lens": torch.tensor([50, 42], device=device),
            "cu_seqlens_q": torch.tensor([0, 1, 9], dtype=torch.int32, device=device),
            "cos_sin_cache": angles(64, 64, device),
            "packed": True,
            "return_lse": True,
        }

    def run(self, backend: str, **tensors: torch.Tensor):
        return block_attention(**{"q": self.q, "k": self.k, "v": self.v} | tensors, **self.options, backend=backend)


@cases("block_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_views(dtype, backend, device):
    read = Read(dtype, device)
    expected = read.run(backend)
    views = VIEWS[1::9] if backend == "triton" else VIEWS  # which compiles for almost each of them
    for number in range(len(views)):
        layouts = [views[number], views[(number + 9) % len(views)]]
        (k, _), (v, _) = view(read.k, **layouts[0]), view(read.v, **layouts[1])
        for x, y in zip(read.run(backend, k=k, v=v), expected, strict=True):
            coarse = 2e-2 if dtype == torch.bfloat16 else 1e-4  # another kernel, or other splits
            torch.testing.assert_close(x, y, rtol=coarse, atol=coarse, msg=f"{layouts}")


@cases("retrieve_blocks")
@pytest.mark.parametrize("pooling", ["query", "softmax"])
def test_retrieval_over_views(pooling, backend, device):
    q, keys = torch.randn(2, 3, 14, 64, device=device), torch.randn(2, 21, 2, 64, device=device)
    expected = retrieve_blocks(q, keys, num_selected=5, pooling=pooling, backend=backend)
    for layout in VIEWS[1::9] if backend == "triton" else VIEWS:
        result = retrieve_blocks(q, view(keys, **layout)[0], num_selected=5, pooling=pooling, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True)), layout


@cases("merge_states")
def test_merging_views(backend, device):
    outs, lses = torch.randn(2, 21, 2, 64, device=device), torch.randn(2, 21, 2, device=device)
    expected = merge_states(outs, lses, backend=backend)
    for layout in VIEWS[1::9] if backend == "triton" else VIEWS:
        for x, y in zip(merge_states(view(outs, **layout)[0], lses, backend=backend), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=f"{layout}")


@cases("block_attention")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_past_int32(dim, backend, device):
    read = Read(torch.bfloat16, device)
    expected = read.run(backend)
    for name in ("k", "v"):
        far = kit.far_apart(getattr(read, name), dim)
        for x, y in zip(read.run(backend, **{name: far}), expected, strict=True):
            torch.testing.assert_close(x, y)
        del far


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens, `[tokens, heads, head_dim]`, by plain PyTorch in its dtype."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)


def rotate(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """RoPE as transformers writes it, in the dtype of `x`."""
    cos, sin = (torch.cat((part, part), -1).to(x.dtype)[:, None] for part in cache.chunk(2, -1))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


@cases("block_attention")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 32])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64)])
def test_error_against_float64(num_qo_heads, num_kv_heads, head_dim, num_queries, dtype, backend, device):
    if kit.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16, where a GPU rounds")
    length = 208 if kit.SLOW else 2000
    k = torch.randn(length, num_kv_heads, head_dim, device=device)
    k[..., ::16] *= 4  # real models have a few channels with large keys,
    q = torch.randn(num_queries, num_qo_heads, head_dim, device=device)
    k[0, :, -1], q[..., -1] = 20, 1.5  # and a first token that takes some of the attention of all queries
    q, k, v = (x.to(dtype) for x in (q, k, torch.randn(length, num_kv_heads, head_dim, device=device)))
    cache = angles(length, head_dim, device)
    own = cache[length - num_queries :]
    exact = attend(rotate(q.double(), own), rotate(k.double(), cache), v.double())
    plain = attend(rotate(q, own), rotate(k, cache), v)
    out = block_attention(
        q, k.view(-1, 16, num_kv_heads, head_dim), v.view(-1, 16, num_kv_heads, head_dim),
        torch.arange(length // 16, dtype=torch.int32, device=device)[None], torch.tensor([length], device=device),
        cos_sin_cache=cache, packed=True, q_positions=torch.arange(length - num_queries, length, device=device),
        backend=backend,
    )  # fmt: skip
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (out, plain))
    assert error <= 2 * allowed, f"{error:.2e}, plain PyTorch {allowed:.2e}"
