# SPDX-License-Identifier: Apache-2.0
"""Attention mass that the latest vision queries put on each cached token."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.score_tokens import score_tokens as _reference

REDUCTIONS = ("kv_head", "layer", "shared")


def score_tokens(
    q: Tensor,
    k: Tensor,
    *,
    seq_lens: Tensor | None = None,
    sm_scale: float | None = None,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    causal: bool = False,
    reduction: str = "kv_head",
    backend: str = "auto",
) -> Tensor:
    """Scores each cached token by the attention it receives from a few queries (higher = keep).

    Softmax of every query over the keys it sees, then the mean over the queries and over the query heads of each KV
    head. With the last vision tokens as queries this is the vision-to-vision score of LiveVLM (arXiv 2505.15269 v2,
    Vision Sink Bucketing), with other queries the observation window of SnapKV (arXiv 2404.14469). The paper does not
    say how heads are pooled; `reduction` is ours.

    Args:
        q: queries, `[*, num_queries, num_qo_heads, head_dim]`, dtype of `k`, any strides. Already rotated by the caller
            if RoPE matters.
        k: keys, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any strides; `num_qo_heads` is a
            multiple of `num_kv_heads`. Leading dimensions are streams and, last of them, layers; they must collapse
            without a copy.
        seq_lens: valid tokens of each sequence, `[*]`, int32 or int64; all of `seq_len` if None. Clamped to 0..seq_len.
            What lies beyond is not read into the result, NaN included.
        sm_scale: factor of the logits, positive; `head_dim ** -0.5` if None.
        positions: position of each key, `[*, seq_len]`, int32 or int64: keys are rotated by RoPE as they are read.
            Values outside 0..max_position - 1 are clamped. None: no RoPE.
        cos_sin_cache: float32 `[max_position, head_dim]`, head_dim / 2 cosines then as many sines per position, for
            half-split rotation as in Qwen2. Given exactly if `positions` is.
        causal: the queries are the last tokens of the sequence: query i sees keys 0..length - num_queries + i only.
        reduction: "kv_head" keeps KV heads apart, "layer" takes the mean over them, "shared" also takes the mean over
            the last leading dimension (the layers).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        float32 `[*, num_kv_heads, seq_len]` for "kv_head", `[*, seq_len]` for "layer", and `[*[:-1], seq_len]` for
        "shared". A row sums to 1 if every query sees a key; a query that sees none contributes zeros. Tokens that no
        query sees, those beyond `seq_lens` included, score 0.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed.
        BackendError: the backend asked for is not available.
    """
    attention.tokens("k", k)
    lead, (seq_len, num_kv_heads, head_dim) = k.shape[:-3], k.shape[-3:]
    attention.queries(q, k, lead, num_kv_heads, head_dim)
    check.choice("reduction", reduction, REDUCTIONS)
    if reduction == "shared" and not lead:
        raise ArgumentError(
            f"reduction='shared' takes the mean over a leading dimension; k has none: its shape is {tuple(k.shape)}"
        )
    if (positions is None) != (cos_sin_cache is None):
        given, missing = ("positions", "cos_sin_cache") if cos_sin_cache is None else ("cos_sin_cache", "positions")
        raise ArgumentError(f"{given} was given without {missing}; RoPE needs both")
    attention.cos_sin_cache(cos_sin_cache, head_dim, "k", k)
    flat = check.collapse("k", k, 3)
    scores = overload("score_tokens", backend, k.device)(
        check.collapse("q", q, 3),
        flat,
        check.seq_lens(seq_lens, flat.shape[0], "k", k),
        attention.per_token("positions", positions, check.INTS, "k", k, (*lead, seq_len)),
        cos_sin_cache,
        attention.scale(sm_scale, head_dim),
        causal,
        reduction == "kv_head",
        lead[-1] if reduction == "shared" else 1,
    )
    if reduction == "kv_head":
        return scores.view(*lead, num_kv_heads, seq_len)
    return scores.view(*(lead[:-1] if reduction == "shared" else lead), seq_len)


def _fake(
    q: Tensor,
    k: Tensor,
    seq_lens: Tensor | None,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    sm_scale: float,
    causal: bool,
    per_head: bool,
    num_shared: int,
) -> Tensor:
    batch, seq_len, num_kv_heads, _ = k.shape
    shape = (batch, num_kv_heads, seq_len) if per_head else (batch // num_shared, seq_len)
    return k.new_empty(shape, dtype=torch.float32)


define(
    "score_tokens",
    "(Tensor q, Tensor k, Tensor? seq_lens, Tensor? positions, Tensor? cos_sin_cache, float sm_scale, bool causal, "
    "bool per_head, int num_shared) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.score_tokens",
)
