# SPDX-License-Identifier: Apache-2.0
"""Joins attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.reference.merge_states import merge_states as _reference


def merge_states(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Combines the results of `block_attention` over disjoint sets of keys.

    The result is what one call over the union of the keys gives, up to rounding: out = sum(exp(lse_i) * out_i) /
    sum(exp(lse_i)), computed from the largest lse down. The online softmax of FlashAttention (arXiv 2205.14135);
    FlashInfer has it under the same name.

    Args:
        outs: outputs of the parts, `[num_parts, total_q, num_qo_heads, head_dim]`, float32, float16 or bfloat16.
        lses: their log-sum-exp, float32 `[num_parts, total_q, num_qo_heads]`, natural logarithm; -inf says that the
            part saw no key, and its output is not read.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(out, lse)`: `[total_q, num_qo_heads, head_dim]` in the dtype of `outs`, and float32 `[total_q, num_qo_heads]`.
        A row that no part saw a key for is zero and has lse -inf.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed.
        BackendError: the backend asked for is not available.
    """
    check.tensor("outs", outs, ndim=4)
    check.dtype("outs", outs, check.FLOATS)
    attention.not_empty("outs", outs)
    check.tensor("lses", lses)
    check.dtype("lses", lses, (torch.float32,))
    check.same_device("lses", lses, "outs", outs)
    check.shape("lses", lses, outs.shape[:3], "[num_parts, total_q, num_qo_heads]")
    out, lse = overload("merge_states", backend, outs.device)(outs, lses)
    return out, lse


def _fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


define(
    "merge_states",
    "(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.merge_states",
)
