# SPDX-License-Identifier: Apache-2.0
"""Similarity-based eviction in one call: score, select and compact for many layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.evict_similar import evict_similar as _reference

MAX_TENSORS = 6


def evict_similar(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    budget: int,
    *,
    num_recent_frames: int,
    tokens_per_frame: int,
    alpha: float = 0.5,
    shared: bool = False,
    per_head: bool = False,
    tensors: Sequence[Tensor] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Shrinks full sequences to `budget` tokens, in place, keeping what the recent frames do not show.

    InfiniPot-V (arXiv 2506.15745). The recent frames are always kept. `round(alpha * rest)` of the remaining
    `rest = budget - num_recent_frames * tokens_per_frame` go to the tokens least similar to the same patch in the
    recent frames, the others to the highest value norms among the tokens not taken yet: `score_redundancy`, then
    `select_tokens` twice, then `compact_tokens`. The paper selects per KV head (`per_head=True`); one set for all heads
    of a layer, and one for all layers (`shared`), are ours. Of equal scores the lower index wins.

    Args:
        k: keys, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any strides, un-rotated; leading
            dimensions are streams and, last of them, layers; they must collapse without a copy. Every sequence is full.
            The last `num_recent_frames * tokens_per_frame` tokens are whole frames in slot order. Changed in place: the
            kept tokens move to the front, in order; what lies behind them is left as it was.
        v: values, shape and dtype of `k`; changed in place likewise.
        slots: patch slot of each token, `[*, seq_len]`, int32, 0..tokens_per_frame - 1; other values: no slot,
            similarity 0.
        budget: tokens kept of each sequence, num_recent_frames * tokens_per_frame..seq_len.
        num_recent_frames: frames always kept and compared with, at least 1.
        tokens_per_frame: tokens of a frame, at least 1.
        alpha: share of the rest that is kept for low similarity, 0..1.
        shared: one keep-set for all layers (the last leading dimension): similarities are averaged over them; so are
            value norms, each layer's divided by its mean first, because norms grow with depth. Excludes `per_head`.
        per_head: every KV head keeps its own tokens; otherwise scores are means over the KV heads.
        tensors: what else is known of each token (positions, timestamps...), at most 6 tensors as `compact_tokens`
            takes them: `[*, seq_len, ...]`, or `[*, seq_len, num_kv_heads, ...]` if `per_head`. Changed in place
            likewise, so that all of a token moves in one call.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(indices, counts)` for whatever else the caller keeps, as `compact_tokens` takes them. indices: int32
        `[*, budget]`, ascending, or `[*, num_kv_heads, budget]` if `per_head`. counts: int32 `[*]` or
        `[*, num_kv_heads]`, equal to `budget` unless scores are NaN: such tokens are not kept, and -1 follows the last
        index.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed; nothing was changed.
        BackendError: the backend asked for is not available; nothing was changed.
    """
    attention.tokens("k", k)
    lead, (seq_len, num_kv_heads, _) = k.shape[:-3], k.shape[-3:]
    attention.like("v", v, "k", k, k.shape, "[*, seq_len, num_kv_heads, head_dim]")
    check.tensor("slots", slots)
    flat_slots = attention.per_token("slots", slots, (torch.int32,), "k", k, (*lead, seq_len))
    check.at_least("num_recent_frames", num_recent_frames, 1)
    check.at_least("tokens_per_frame", tokens_per_frame, 1)
    recent = num_recent_frames * tokens_per_frame
    if not recent <= budget <= seq_len:
        raise ArgumentError(
            f"budget={budget} must lie between num_recent_frames * tokens_per_frame = {recent} and seq_len = {seq_len}"
        )
    check.between("alpha", alpha, 0, 1)
    if shared and per_head:
        raise ArgumentError("shared=True and per_head=True exclude each other: heads of different layers do not match")
    if shared and not lead:
        raise ArgumentError(f"shared=True needs a leading dimension of layers; the shape of k is {tuple(k.shape)}")
    attention.writable("k", k)
    attention.writable("v", v)
    if not isinstance(tensors, (list, tuple)) or len(tensors) > MAX_TENSORS:
        raise ArgumentError(f"tensors must be a list of at most {MAX_TENSORS} torch.Tensors, not {tensors!r:.80}")
    others = attention.movable(tensors, (*lead, seq_len), k.shape[-2:-1] if per_head else (), "k", k)
    indices, counts = overload("evict_similar", backend, k.device)(
        check.collapse("k", k, 3),
        check.collapse("v", v, 3),
        flat_slots,
        others,
        budget,
        num_recent_frames,
        tokens_per_frame,
        round(alpha * (budget - recent)),
        per_head,
        lead[-1] if shared else 1,
    )
    heads = (num_kv_heads,) if per_head else ()
    return indices.view(*lead, *heads, budget), counts.view((*lead, *heads))


def _fake(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tensors: list[Tensor],
    budget: int,
    num_recent_frames: int,
    tokens_per_frame: int,
    num_dissimilar: int,
    per_head: bool,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], k.shape[2]) if per_head else (k.shape[0],)
    return k.new_empty((*shape, budget), dtype=torch.int32), k.new_empty(shape, dtype=torch.int32)


define(
    "evict_similar",
    "(Tensor(a!) k, Tensor(b!) v, Tensor slots, Tensor(c!)[] tensors, int budget, int num_recent_frames, "
    "int tokens_per_frame, int num_dissimilar, bool per_head, int num_shared) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.evict_similar",
)
