# SPDX-License-Identifier: Apache-2.0
"""`score_tokens` against attention written out head by head in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import kit
import livevlm_kernels
from livevlm_kernels import ArgumentError, score_tokens
from livevlm_kernels.reference import _chunks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("score_tokens"))

# batch, num_queries, seq_len, num_qo_heads, num_kv_heads, head_dim
SHAPES = [
    pytest.param((2, 64, 300, 28, 4, 128), id="7B"),
    pytest.param((2, 16, 197, 14, 2, 64), id="0.5B"),
    pytest.param((1, 1, 1, 1, 1, 2), id="ones"),
    pytest.param((3, 5, 31, 3, 3, 18), id="group_1"),
    pytest.param((2, 7, 53, 9, 3, 34), id="group_3"),
]


def inputs(shape, device, dtype=torch.float32):
    batch, num_queries, seq_len, num_qo_heads, num_kv_heads, head_dim = shape
    q = torch.randn(batch, num_queries, num_qo_heads, head_dim, device=device)
    return q.to(dtype), torch.randn(batch, seq_len, num_kv_heads, head_dim, device=device).to(dtype)


def angles(head_dim, max_position, device):
    frequency = 10_000 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    return torch.arange(max_position, device=device)[:, None] * frequency


def cache_of(angle):
    return torch.cat((angle.cos(), angle.sin()), -1).float()


def rotated(k, positions, angle):
    """RoPE by complex numbers: elements i and i + head_dim / 2 are one number."""
    half = k.shape[-1] // 2
    number = torch.complex(k[..., :half].double(), k[..., half:].double())
    turn = angle[positions.clamp(0, len(angle) - 1).long()].double()
    number = number * torch.polar(torch.ones_like(turn), turn).unsqueeze(-2)
    return torch.cat((number.real, number.imag), -1)


def naive(q, k, lens=None, scale=None, causal=False):
    """[B, H, L] in float64."""
    batch, num_queries, num_qo_heads, head_dim = q.shape
    seq_len, num_kv_heads = k.shape[1:3]
    result = torch.zeros(batch, num_kv_heads, seq_len, dtype=torch.float64, device=q.device)
    group = num_qo_heads // num_kv_heads
    for b in range(batch):
        length = seq_len if lens is None else max(0, min(lens[b], seq_len))
        for head in range(num_qo_heads):
            for row in range(num_queries):
                end = length - num_queries + row + 1 if causal else length
                if end > 0:
                    keys = k[b, :end, head // group].double()
                    logits = keys @ q[b, row, head].double() * (head_dim**-0.5 if scale is None else scale)
                    result[b, head // group, :end] += logits.softmax(0) / (num_queries * group)
    return result


def close(result, expected):
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=1e-7)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_attention(shape, causal, dtype, backend, device):
    q, k = inputs(shape, device, dtype)
    close(score_tokens(q, k, causal=causal, backend=backend), naive(q, k, causal=causal))


@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_sequences_over_garbage(causal, backend, device):
    lens = [0, 1, 4, 5, 36, 37, 99, -2]
    q, k = inputs((len(lens), 5, 37, 6, 2, 16), device)
    clean = k.clone()
    for row, length in enumerate(lens):
        k[row, max(0, length) :] = torch.nan if row % 2 else torch.inf
    result = score_tokens(q, k, seq_lens=torch.tensor(lens, device=device), causal=causal, backend=backend)
    close(result, naive(q, clean, lens, causal=causal))
    assert not result[0].any() and not result[7].any() and not result[4, :, 36:].any()


@each_backend
def test_reductions(backend, device):
    q, k = (x.unflatten(0, (2, 3)) for x in inputs((6, 4, 29, 6, 2, 16), device))  # [streams, layers, ...]
    lens = torch.tensor([[29, 3, 0], [1, 20, 29]], device=device)
    head, layer, shared = (
        score_tokens(q, k, seq_lens=lens, reduction=reduction, backend=backend)
        for reduction in ("kv_head", "layer", "shared")
    )
    assert head.shape == (2, 3, 2, 29)
    close(head.flatten(0, 1), naive(q.flatten(0, 1), k.flatten(0, 1), lens.flatten().tolist()))
    torch.testing.assert_close(layer, head.mean(2))
    torch.testing.assert_close(shared, layer.mean(1))


@each_backend
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_rope_at_read(position_dtype, backend, device):
    q, k = inputs((2, 6, 41, 14, 2, 64), device)
    angle = angles(64, 1000, device)
    positions = torch.randint(-3, 1003, (2, 41), device=device, dtype=position_dtype)  # clamped to the cache
    result = score_tokens(q, k, positions=positions, cos_sin_cache=cache_of(angle), causal=True, backend=backend)
    torch.testing.assert_close(
        result.double(), naive(q, rotated(k, positions, angle), causal=True), rtol=2e-4, atol=1e-6
    )
    options = {"cos_sin_cache": cache_of(angle), "backend": backend}
    expanded = score_tokens(q, k, positions=positions[:1].expand(2, -1), **options)
    assert torch.equal(expanded[0], score_tokens(q, k, positions=positions, **options)[0])


@each_backend
def test_agrees_with_the_rope_of_transformers(backend, device):
    qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    q, k = inputs((1, 3, 19, 2, 1, 32), device)
    positions = torch.arange(5, 24, device=device)[None]
    cache = cache_of(angles(32, 100, device))
    cos, sin = (torch.cat((x, x), -1) for x in cache[positions].chunk(2, -1))
    key = qwen2.apply_rotary_pos_emb(k, k, cos, sin, unsqueeze_dim=2)[1]
    torch.testing.assert_close(
        score_tokens(q, k, positions=positions, cos_sin_cache=cache, backend=backend),
        score_tokens(q, key, backend=backend),
    )


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in livevlm_kernels.backends("score_tokens", "cuda"), reason="built without CUDA kernels")
def test_tensor_cores_without_warpgroup_products():
    """What GPUs before Hopper run; on Hopper only when asked for, so in a process of its own."""
    code = """
import torch
from livevlm_kernels import score_tokens
for heads, head_dim in ((4, 128), (2, 64)):
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.randn(2, 64, 7 * heads, head_dim, device="cuda").to(dtype)
        k = torch.randn(2, 5000, heads, head_dim, device="cuda").to(dtype)
        for causal in (False, True):
            result, expected = (score_tokens(q, k, causal=causal, backend=b) for b in ("cuda", "reference"))
            torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-7)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"LIVEVLM_SCORE": "mma"})


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts(layout, backend, device):
    q, k = inputs((2, 5, 21, 14, 2, 64), device)
    result = score_tokens(kit.LAYOUTS[layout](q), kit.LAYOUTS[layout](k), backend=backend)
    torch.testing.assert_close(result, score_tokens(q, k, backend=backend))


@each_backend
def test_rows_sum_to_one_and_a_zero_query_is_uniform(backend, device):
    q, k = inputs((2, 5, 40, 4, 2, 8), device)
    torch.testing.assert_close(score_tokens(q * 30, k, backend=backend).sum(-1), torch.ones(2, 2, device=device))
    uniform = score_tokens(q * 0, k, backend=backend)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 40))
    huge = score_tokens(q * 1e4, k * 1e4, backend=backend)  # logits far beyond what exp can hold
    assert huge.isfinite().all()


@each_backend
def test_order_of_tokens_and_scale(backend, device):
    q, k = inputs((1, 5, 40, 4, 2, 8), device)
    order = torch.randperm(40, device=device)
    torch.testing.assert_close(
        score_tokens(q, k[:, order], backend=backend), score_tokens(q, k, backend=backend)[..., order]
    )
    close(score_tokens(q, k, sm_scale=1.7, backend=backend), naive(q, k, scale=1.7))


@pytest.mark.parametrize("most", [1, 500, 3_000, 10_000])
def test_chunks_do_not_change_the_reference(most, monkeypatch):
    q, k = inputs((5, 3, 50, 6, 3, 8), "cpu")
    lens = torch.tensor([50, 3, 0, 49, 20])
    expected = score_tokens(q, k, seq_lens=lens, causal=True, backend="reference")
    monkeypatch.setattr(_chunks, "MAX_ELEMENTS", most)
    torch.testing.assert_close(score_tokens(q, k, seq_lens=lens, causal=True, backend="reference"), expected)


Q, K = torch.randn(2, 3, 6, 8), torch.randn(2, 10, 2, 8)
POSITIONS, CACHE = torch.zeros(2, 10, dtype=torch.int32), torch.zeros(4, 8)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": Q[0]},
            r"q must have shape \[\*, num_queries, num_qo_heads, head_dim\] = \(2, 3, 6, 8\), not \(3, 6, 8\)",
        ),
        ({"q": Q[..., :4]}, r"q must have shape .* = \(2, 3, 6, 8\), not \(2, 3, 6, 4\)"),
        ({"q": Q.half()}, r"q has dtype float16; allowed: float32"),
        ({"q": Q[:, :, :5]}, r"q has 5 heads; allowed: multiples of num_kv_heads = 2"),
        ({"q": Q[:, :0]}, r"q is empty"),
        ({"k": K.double()}, r"k has dtype float64; allowed: float32, float16, bfloat16"),
        ({"k": K[:, :0]}, r"k is empty: its shape is \(2, 0, 2, 8\)"),
        ({"k": 1}, r"k must be a torch.Tensor, not int"),
        ({"q": Q[0], "k": K[0], "reduction": "shared"}, r"reduction='shared' .* k has none: its shape is \(10, 2, 8\)"),
        ({"reduction": "head"}, r"reduction='head' is unknown; allowed: kv_head, layer, shared"),
        ({"sm_scale": 0.0}, r"sm_scale=0.0 must be positive and finite"),
        ({"sm_scale": float("nan")}, r"sm_scale=nan must be positive and finite"),
        ({"positions": POSITIONS}, r"positions was given without cos_sin_cache"),
        ({"cos_sin_cache": CACHE}, r"cos_sin_cache was given without positions"),
        ({"positions": POSITIONS[:, :3], "cos_sin_cache": CACHE}, r"positions must have shape \[\*, seq_len\]"),
        (
            {"positions": POSITIONS.float(), "cos_sin_cache": CACHE},
            r"positions has dtype float32; allowed: int32, int64",
        ),
        ({"positions": POSITIONS, "cos_sin_cache": CACHE.half()}, r"cos_sin_cache has dtype float16; allowed: float32"),
        ({"positions": POSITIONS, "cos_sin_cache": CACHE[:, :6]}, r"cos_sin_cache must have shape .* = \(4, 8\)"),
        ({"positions": POSITIONS, "cos_sin_cache": CACHE[:0]}, r"cos_sin_cache is empty"),
        ({"seq_lens": torch.tensor([1])}, r"seq_lens has 1 entries; the leading dimensions of k give 2"),
    ],
)
def test_refuses(change, message, backend, device):
    arguments = {"q": Q, "k": K, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        score_tokens(**moved, backend=backend)


def test_refuses_odd_head_dim_with_rope_and_uncollapsible_views():
    with pytest.raises(ArgumentError, match="head_dim=7 must be even when cos_sin_cache is given"):
        score_tokens(Q[..., :7], K[..., :7], positions=POSITIONS, cos_sin_cache=CACHE[:, :7])
    k = torch.randn(3, 2, 10, 2, 8).transpose(0, 1)
    with pytest.raises(ArgumentError, match="k: its leading dimensions"):
        score_tokens(torch.randn(2, 3, 3, 6, 8), k)
