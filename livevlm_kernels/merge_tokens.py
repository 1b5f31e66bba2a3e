# SPDX-License-Identifier: Apache-2.0
"""Folds tokens into others instead of dropping them."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.merge_tokens import merge_tokens as _reference


def merge_tokens(
    k: Tensor,
    v: Tensor,
    *,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    indices: Tensor | None = None,
    sizes: Tensor | None = None,
    weights: Tensor | None = None,
    seq_lens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces groups of tokens by the weighted means of their keys and of their values.

    With `groups` the caller says which token goes where: one group a frame is the frame merging of LiveVLM v1 (arXiv
    2505.15269 v1), and with attention `weights` that of StreamMem (arXiv 2508.15717). With `indices` every valid token
    that is not a survivor is folded into the survivor whose key, all heads as one vector, has the highest cosine to its
    own: bipartite merging in the manner of ToMe (arXiv 2210.09461) and kvpress' MergingPress. There the lowest row wins
    ties, which means exact ties of float32 cosines. Who takes in whom among keys that hold NaN is not defined.

    A token counts with the weight size * weight, and the sum of these is the size of the merged token. Passing sizes on
    makes merging in steps the same as merging at once, up to the rounding of `k` and `v` to their dtype.

    Args:
        k: keys, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any strides, un-rotated; leading
            dimensions must collapse without a copy.
        v: values, shape and dtype of `k`.
        groups: target row of each token, `[*, seq_len]`, int32; outside 0..num_groups - 1 (use -1): dropped. Exactly
            one of `groups` and `indices` is given.
        num_groups: rows of the result, at least 1; given exactly if `groups` is.
        indices: survivors, `[*, n]`, int32, unique, as `select_tokens` returns them; row j of the result grows from
            token `indices[j]`. An index that names no valid token (use -1) makes an empty row.
        sizes: how many tokens each token stands for, `[*, seq_len]`, float32, not negative; 1 if None.
        weights: further weight of each token, `[*, seq_len]`, float32, not negative; 1 if None.
        seq_lens: valid tokens of each sequence, `[*]`, int32 or int64; all of `seq_len` if None. What lies beyond is
            not read into the result, NaN included.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(k_out, v_out, sizes_out)`: `[*, num_groups or n, num_kv_heads, head_dim]` in the dtype of `k`, twice, and
        float32 `[*, num_groups or n]`. An empty row, and one whose weights sum to 0, is zero and has size 0. Sums run
        in float32 in a fixed order.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed, or not exactly one way of grouping is
            given.
        BackendError: the backend asked for is not available.
    """
    attention.tokens("k", k)
    lead, seq_len = k.shape[:-3], k.shape[-3]
    attention.like("v", v, "k", k, k.shape, "[*, seq_len, num_kv_heads, head_dim]")
    flat = check.collapse("k", k, 3)
    batch = flat.shape[0]
    if (groups is None) == (indices is None):
        given = "none" if groups is None else "both"
        raise ArgumentError(f"exactly one of groups and indices must be given, not {given}")
    if (groups is None) != (num_groups is None):
        raise ArgumentError(f"num_groups={num_groups}: it must be given with groups, and only then")
    if indices is not None:
        check.tensor("indices", indices, ndim=len(lead) + 1)
        attention.not_empty("indices", indices)
        num_groups = indices.shape[-1]
    assert num_groups is not None
    check.at_least("num_groups", num_groups, 1)
    shape, floats = (*lead, seq_len), (torch.float32,)
    k_out, v_out, sizes_out = overload("merge_tokens", backend, k.device)(
        flat,
        check.collapse("v", v, 3),
        attention.per_token("groups", groups, (torch.int32,), "k", k, shape),
        attention.per_token("indices", indices, (torch.int32,), "k", k, (*lead, num_groups), "[*, n]"),
        attention.per_token("sizes", sizes, floats, "k", k, shape),
        attention.per_token("weights", weights, floats, "k", k, shape),
        check.seq_lens(seq_lens, batch, "k", k),
        num_groups,
    )
    rows = (*lead, num_groups, *k.shape[-2:])
    return k_out.view(rows), v_out.view(rows), sizes_out.view(*lead, num_groups)


def _fake(
    k: Tensor,
    v: Tensor,
    groups: Tensor | None,
    indices: Tensor | None,
    sizes: Tensor | None,
    weights: Tensor | None,
    seq_lens: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, num_kv_heads, head_dim = k.shape
    shape = (batch, num_groups, num_kv_heads, head_dim)
    return k.new_empty(shape), v.new_empty(shape), k.new_empty(shape[:2], dtype=torch.float32)


define(
    "merge_tokens",
    "(Tensor k, Tensor v, Tensor? groups, Tensor? indices, Tensor? sizes, Tensor? weights, Tensor? seq_lens, "
    "SymInt num_groups) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.merge_tokens",
)
