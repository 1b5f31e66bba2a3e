# SPDX-License-Identifier: Apache-2.0
"""Block representatives: what retrieval looks at instead of the keys themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.summarize_blocks import summarize_blocks as _reference

KINDS = ("mean", "minmax")


def summarize_blocks(
    k: Tensor,
    *,
    block_size: int,
    kind: str = "mean",
    seq_lens: Tensor | None = None,
    first_token: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Summarises each block of consecutive cached keys, per KV head.

    "mean" is the representative of LiveVLM (arXiv 2505.15269 v2, Page-based Retrieval) and ReKV (arXiv 2503.00540,
    section 3.3); "minmax" holds the element-wise bounds of Quest (arXiv 2406.10774, section 3.3). Keys should be
    un-rotated: after eviction the positions in a block have gaps, and a mean of rotated keys means little.

    Args:
        k: keys, `[*, seq_len, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any strides. Leading dimensions
            are layers and streams, all served by one launch; they must collapse without a copy.
        block_size: tokens in a block, at least 1. The last block of a sequence may hold fewer.
        kind: "mean" or "minmax".
        seq_lens: valid tokens of each sequence, `[*]`, int32 or int64, on the device of `k`; all of `seq_len` if None.
            Values are clamped to 0..seq_len.
        first_token: first changed token of each sequence, `[*]`, int32 or int64. Only blocks that hold it or a
            later token are written; for incremental updates of `out`. All blocks if None.
        out: result tensor to write into, contiguous; a new one if None. Required with `first_token`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        float32, `[*, num_blocks, num_kv_heads, head_dim]` for "mean" and
        `[*, num_blocks, 2, num_kv_heads, head_dim]` (minimum, maximum) for "minmax", where
        `num_blocks = ceil(seq_len / block_size)`. Blocks without a valid token are zero. Sums run in float32 in token
        order: results are deterministic and do not depend on the batch.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed; `out` is left as it was.
        BackendError: the backend asked for is not available.
    """
    check.tensor("k", k, min_ndim=3)
    check.dtype("k", k, check.FLOATS)
    check.at_least("block_size", block_size, 1)
    check.choice("kind", kind, KINDS)
    lead, (seq_len, num_kv_heads, head_dim) = k.shape[:-3], k.shape[-3:]
    if k.numel() == 0:
        raise ArgumentError(f"k is empty: its shape is {tuple(k.shape)}; every dimension must be at least 1")
    flat = check.collapse("k", k, 3)
    batch = flat.shape[0]
    lens = check.seq_lens(seq_lens, batch, "k", k)

    num_blocks = -(-seq_len // block_size)
    bounds = (2,) if kind == "minmax" else ()
    shape = (*lead, num_blocks, *bounds, num_kv_heads, head_dim)
    if out is None:
        if first_token is not None:
            raise ArgumentError("first_token was given without out; an incremental update needs a tensor to update")
        out = torch.empty(shape, dtype=torch.float32, device=k.device)
    else:
        check.tensor("out", out)
        check.dtype("out", out, (torch.float32,))
        check.same_device("out", out, "k", k)
        check.shape("out", out, shape, "[*, num_blocks, (2,) num_kv_heads, head_dim]")
        if not out.is_contiguous():
            raise ArgumentError(f"out must be contiguous; its strides are {out.stride()}")
    first = check.seq_lens(first_token, batch, "k", k, "first_token")
    overload("summarize_blocks", backend, k.device)(
        flat, lens, first, block_size, kind == "minmax", out.view(batch, num_blocks, *bounds, num_kv_heads, head_dim)
    )
    return out


def _fake(
    k: Tensor, seq_lens: Tensor | None, first_token: Tensor | None, block_size: int, minmax: bool, out: Tensor
) -> None:
    return None


define(
    "summarize_blocks",
    "(Tensor k, Tensor? seq_lens, Tensor? first_token, int block_size, bool minmax, Tensor(a!) out) -> ()",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.summarize_blocks",
)
