# SPDX-License-Identifier: Apache-2.0
"""How far each cached token is from what its image patch usually looks like, and from what it looked like before."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.reference.score_novelty import score_novelty as _reference


def score_novelty(
    x: Tensor,
    usual: Tensor,
    slots: Tensor,
    previous: Tensor,
    *,
    seq_lens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Distance of each token to the mean of its patch slot, and to an earlier token of that slot; ours.

    Unlike a cosine (`score_redundancy`), a distance also sees that a token became longer. Differences are taken in
    float32 and squared afterwards, so that two tokens that are nearly the same have an exact small distance.

    Args:
        x: what tokens are compared by, mostly values, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or
            bfloat16, any strides; leading dimensions must collapse without a copy.
        usual: mean of `x` that each patch slot has had so far, `[*, tokens_per_frame, num_kv_heads, head_dim]`,
            float32, any strides.
        slots: patch slot of each token, `[*, seq_len]`, int32, 0..tokens_per_frame - 1; any other value (use -1) means
            that the token has no slot.
        previous: index of the token to compare with, `[*, seq_len]`, int32: an earlier one of the same slot. Any value
            that is not the index of a valid token (use -1) means that there is none.
        seq_lens: valid tokens of each sequence, `[*]`, int32 or int64; all of `seq_len` if None.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(change, step)`, both float32 `[*, seq_len]`. Tokens beyond `seq_lens` have 0 in both.
        change: Euclidean distance over all heads and dimensions to the slot's mean; +inf without a slot.
        step: the same to the token `previous`; +inf without one.

    Raises:
        ArgumentError: a shape, dtype, device or stride is not allowed.
        BackendError: the backend asked for is not available.
    """
    attention.tokens("x", x)
    lead, (seq_len, num_kv_heads, head_dim) = x.shape[:-3], x.shape[-3:]
    attention.tokens("usual", usual)
    check.dtype("usual", usual, (torch.float32,))
    check.same_device("usual", usual, "x", x)
    means = (*lead, usual.shape[-3], num_kv_heads, head_dim)
    check.shape("usual", usual, means, "[*, tokens_per_frame, num_kv_heads, head_dim]")
    flat = check.collapse("x", x, 3)
    check.tensor("slots", slots)
    check.tensor("previous", previous)
    change, step = overload("score_novelty", backend, x.device)(
        flat,
        check.collapse("usual", usual, 3),
        attention.per_token("slots", slots, (torch.int32,), "x", x, (*lead, seq_len)),
        attention.per_token("previous", previous, (torch.int32,), "x", x, (*lead, seq_len)),
        check.seq_lens(seq_lens, flat.shape[0], "x", x),
    )
    return change.view(*lead, seq_len), step.view(*lead, seq_len)


def _fake(x: Tensor, usual: Tensor, slots: Tensor, previous: Tensor, seq_lens: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


define(
    "score_novelty",
    "(Tensor x, Tensor usual, Tensor slots, Tensor previous, Tensor? seq_lens) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.score_novelty",
)
