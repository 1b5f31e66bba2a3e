# SPDX-License-Identifier: Apache-2.0
"""How much each cached token repeats what the same image patch shows in the recent frames."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.reference.score_redundancy import score_redundancy as _reference


def score_redundancy(
    k: Tensor,
    v: Tensor,
    recent_k: Tensor,
    slots: Tensor,
    *,
    seq_lens: Tensor | None = None,
    per_head: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Similarity of each key to the same patch in recent frames, and the length of each value.

    The two scores of InfiniPot-V (arXiv 2506.15745): temporal-axis redundancy (TaR), where a high similarity means that
    the token is redundant (so `-similarity` is the score to keep by), and value norm (VaN), where higher = keep.
    Smoothing value norms over neighbouring patches, which its code does in some layers, is left to the caller.

    Args:
        k: keys, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any strides; leading dimensions
            must collapse without a copy. Keys should be un-rotated: rotation by time would hide that a patch repeats.
        v: values, shape and dtype of `k`.
        recent_k: keys of recent frames in slot order,
            `[*, num_recent_frames, tokens_per_frame, num_kv_heads, head_dim]`, dtype of `k`.
        slots: patch slot of each token, `[*, seq_len]`, int32, 0..tokens_per_frame - 1; any other value (use -1) means
            that the token has no slot, and its similarity is 0.
        seq_lens: valid tokens of each sequence, `[*]`, int32 or int64; all of `seq_len` if None.
        per_head: keep KV heads apart; otherwise both results are means over the KV heads.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(similarity, value_norm)`, both float32 `[*, num_kv_heads, seq_len]`, or `[*, seq_len]` if not `per_head`.
        similarity: mean over the recent frames of the cosine to the key in the same slot, -1..1; a zero key has cosine
            0.
        value_norm: L2 norm. Tokens beyond `seq_lens` have 0 in both.

    Raises:
        ArgumentError: a shape, dtype, device or stride is not allowed.
        BackendError: the backend asked for is not available.
    """
    attention.tokens("k", k)
    lead, (seq_len, num_kv_heads, head_dim) = k.shape[:-3], k.shape[-3:]
    attention.like("v", v, "k", k, k.shape, "[*, seq_len, num_kv_heads, head_dim]")
    attention.tokens("recent_k", recent_k, min_ndim=4)
    frames = (*lead, *recent_k.shape[-4:-2], num_kv_heads, head_dim)
    meaning = "[*, num_recent_frames, tokens_per_frame, num_kv_heads, head_dim]"
    attention.like("recent_k", recent_k, "k", k, frames, meaning)
    flat = check.collapse("k", k, 3)
    check.tensor("slots", slots)
    similarity, value_norm = overload("score_redundancy", backend, k.device)(
        flat,
        check.collapse("v", v, 3),
        check.collapse("recent_k", recent_k, 4),
        attention.per_token("slots", slots, (torch.int32,), "k", k, (*lead, seq_len)),
        check.seq_lens(seq_lens, flat.shape[0], "k", k),
        per_head,
    )
    shape = (*lead, num_kv_heads, seq_len) if per_head else (*lead, seq_len)
    return similarity.view(shape), value_norm.view(shape)


def _fake(
    k: Tensor, v: Tensor, recent_k: Tensor, slots: Tensor, seq_lens: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_kv_heads, _ = k.shape
    shape = (batch, num_kv_heads, seq_len) if per_head else (batch, seq_len)
    return k.new_empty(shape, dtype=torch.float32), k.new_empty(shape, dtype=torch.float32)


define(
    "score_redundancy",
    "(Tensor k, Tensor v, Tensor recent_k, Tensor slots, Tensor? seq_lens, bool per_head) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.score_redundancy",
)
