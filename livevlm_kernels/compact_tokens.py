# SPDX-License-Identifier: Apache-2.0
"""Moves kept tokens to the front of the memory, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.compact_tokens import compact_tokens as _reference


def compact_tokens(
    tensors: Sequence[Tensor], indices: Tensor, *, per_head: bool = False, backend: str = "auto"
) -> None:
    """Moves the tokens that `indices` names to the front of every tensor, in place.

    Afterwards row j of a tensor is what its row `indices[j]` was. Rows whose index is -1, and all rows from n on, stay
    as they were. The last step of every eviction here (ours). Sorted, unique indices move tokens forward or not at all,
    so that a kernel needs no second copy of the memory.

    Args:
        tensors: keys, values, positions, timestamps, weights..., each `[*, seq_len, ...]` of any dtype and any strides
            (views are updated through), with the same leading dimensions and `seq_len`. The leading dimensions must
            collapse without a copy. No element may be shared: neither inside a tensor (`expand`) nor between two.
        indices: int32 `[*, n]`, or `[*, num_kv_heads, n]` if `per_head`; ascending and unique, then -1, as
            `select_tokens` returns them; n is at most `seq_len`. An index outside 0..seq_len - 1 is treated as -1. If
            the order is another, which tokens the front rows hold is the caller's risk; no other memory is touched.
        per_head: every KV head keeps its own tokens; every tensor must then be `[*, seq_len, num_kv_heads, ...]`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        ArgumentError: a shape, dtype, device or stride is not allowed; no tensor was changed.
        BackendError: the backend asked for is not available; no tensor was changed.
    """
    own = 2 if per_head else 1
    check.tensor("indices", indices, min_ndim=own)
    check.dtype("indices", indices, (torch.int32,))
    attention.not_empty("indices", indices)
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise ArgumentError(f"tensors must be a list of at least one torch.Tensor, not {tensors!r:.80}")
    lead, num_kept = indices.shape[:-own], indices.shape[-1]
    num_lead = len(lead)
    check.tensor("tensors[0]", tensors[0], min_ndim=num_lead + own)
    seq_len = tensors[0].shape[num_lead]
    flat = attention.movable(tensors, (*lead, seq_len), indices.shape[-2:-1] if per_head else (), "indices", indices)
    if num_kept > seq_len:
        raise ArgumentError(f"indices names {num_kept} tokens of each row; tensors[0] has seq_len = {seq_len} of them")
    rows = indices.reshape(math.prod(lead), *indices.shape[-own:]).contiguous()
    overload("compact_tokens", backend, indices.device)(flat, rows, per_head)


def _fake(tensors: list[Tensor], indices: Tensor, per_head: bool) -> None:
    return None


define(
    "compact_tokens",
    "(Tensor(a!)[] tensors, Tensor indices, bool per_head) -> ()",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.compact_tokens",
)
