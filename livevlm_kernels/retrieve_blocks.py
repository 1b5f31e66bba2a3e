# SPDX-License-Identifier: Apache-2.0
"""Which blocks of the memory a question needs."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.retrieve_blocks import retrieve_blocks as _reference

KINDS = ("mean", "minmax", "mass")
POOLINGS = ("query", "softmax")


def retrieve_blocks(
    q: Tensor,
    keys: Tensor,
    *,
    num_selected: int,
    kind: str = "mean",
    pooling: str | None = None,
    ratio: float | None = None,
    block_size: int | None = None,
    seq_lens: Tensor | None = None,
    num_sink_blocks: int = 0,
    num_recent_blocks: int = 0,
    per_head: bool = False,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Selects the blocks that fit a question best, as a block table in time order.

    Score of a block, by `kind`:
    "mean": dot product with its mean key, as in ReKV (arXiv 2503.00540, section 3.3) and the Page-based Retrieval of
    LiveVLM (arXiv 2505.15269 v2). "minmax": Quest's upper bound, the sum over dimensions of max(q * min, q * max)
    (arXiv 2406.10774, section 3.3). "mass" (ours): its attention mass, softmax over all valid keys summed in the block.

    By `pooling`: "query" scores the mean of the question's queries once, as ReKV does. "softmax" takes the softmax over
    the valid blocks for each query and head and sums these (ours; far better at finding what a question is about).
    Scores are summed over the query heads, of one KV head if `per_head`, of all otherwise.

    Args:
        q: un-rotated queries of the question, `[*, num_queries, num_qo_heads, head_dim]`, float32, float16 or bfloat16,
            any strides.
        keys: block summaries as from `summarize_blocks`, `[*, num_blocks, num_kv_heads, head_dim]` for "mean" and
            `[*, num_blocks, 2, num_kv_heads, head_dim]` for "minmax"; for "mass" the un-rotated cached keys
            `[*, seq_len, num_kv_heads, head_dim]`, dtype of `q`. float32, float16 or bfloat16; leading dimensions must
            collapse without a copy.
        num_selected: width of the table, and the most blocks to select, at least 1.
        kind: "mean", "minmax" or "mass".
        pooling: "query" or "softmax"; None: "softmax" for "mass", which allows no other, else "query".
        ratio: select only this share of the valid blocks, above 0 and at most 1, rounded up; but always the sink and
            recent blocks. None: no such limit.
        block_size: tokens in a block, at least 1; given exactly if `kind` is "mass".
        seq_lens: valid entries of `keys` along its sequence dimension, `[*]`, int32 or int64: blocks for "mean" and
            "minmax", tokens for "mass". All if None; clamped to what `keys` holds.
        num_sink_blocks: first blocks that are always selected, counted in `num_selected`.
        num_recent_blocks: last valid blocks that are always selected, counted in `num_selected`.
        per_head: every KV head selects its own blocks.
        sm_scale: factor of the logits in a softmax, positive; `head_dim ** -0.5` if None.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(block_table, counts)`. block_table: int32 `[*, num_selected]`, or `[*, num_kv_heads, num_selected]` if
        `per_head`: block numbers, ascending, then -1. counts: int32 `[*]` or `[*, num_kv_heads]`. Of equal scores the
        lower block wins. A block whose score is NaN or -inf is selected only as a sink or recent block; in a softmax
        one NaN makes every score NaN.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed.
        BackendError: the backend asked for is not available.
    """
    check.choice("kind", kind, KINDS)
    if pooling is None:
        pooling = "softmax" if kind == "mass" else "query"
    check.choice("pooling", pooling, POOLINGS if kind != "mass" else ("softmax",))
    trailing = 4 if kind == "minmax" else 3
    attention.tokens("keys", keys, min_ndim=trailing)
    lead, entries, (num_kv_heads, head_dim) = keys.shape[:-trailing], keys.shape[-trailing], keys.shape[-2:]
    if kind == "minmax":
        expected = (*lead, entries, 2, num_kv_heads, head_dim)
        check.shape("keys", keys, expected, "[*, num_blocks, 2, num_kv_heads, head_dim]")
    attention.tokens("q", q)
    check.same_device("q", q, "keys", keys)
    num_queries, num_qo_heads = q.shape[-3:-1]
    meaning = "[*, num_queries, num_qo_heads, head_dim]"
    check.shape("q", q, (*lead, num_queries, num_qo_heads, head_dim), meaning)
    attention.group("q", num_qo_heads, num_kv_heads)
    if kind == "mass":
        check.dtype("q", q, (keys.dtype,))
    if (kind == "mass") != (block_size is not None):
        raise ArgumentError(f"block_size={block_size} with kind={kind!r}: it must be given with 'mass', and only then")
    check.at_least("block_size", 1 if block_size is None else block_size, 1)
    check.at_least("num_selected", num_selected, 1)
    check.at_least("num_sink_blocks", num_sink_blocks, 0)
    check.at_least("num_recent_blocks", num_recent_blocks, 0)
    if num_sink_blocks + num_recent_blocks > num_selected:
        raise ArgumentError(
            f"num_selected={num_selected} must be at least num_sink_blocks + num_recent_blocks = "
            f"{num_sink_blocks + num_recent_blocks}"
        )
    if ratio is not None and not 0 < ratio <= 1:
        raise ArgumentError(f"ratio={ratio} must be above 0 and at most 1")
    flat = check.collapse("keys", keys, trailing)
    block_table, counts = overload("retrieve_blocks", backend, keys.device)(
        check.collapse("q", q, 3),
        flat,
        check.seq_lens(seq_lens, flat.shape[0], "keys", keys),
        KINDS.index(kind),
        pooling == "softmax",
        num_selected,
        ratio,
        1 if block_size is None else block_size,
        num_sink_blocks,
        num_recent_blocks,
        per_head,
        attention.scale(sm_scale, head_dim),
    )
    heads = (num_kv_heads,) if per_head else ()
    return block_table.view(*lead, *heads, num_selected), counts.view((*lead, *heads))


def _fake(
    q: Tensor,
    keys: Tensor,
    seq_lens: Tensor | None,
    kind: int,
    softmax: bool,
    num_selected: int,
    ratio: float | None,
    block_size: int,
    num_sink_blocks: int,
    num_recent_blocks: int,
    per_head: bool,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (keys.shape[0], keys.shape[-2]) if per_head else (keys.shape[0],)
    return keys.new_empty((*shape, num_selected), dtype=torch.int32), keys.new_empty(shape, dtype=torch.int32)


define(
    "retrieve_blocks",
    "(Tensor q, Tensor keys, Tensor? seq_lens, int kind, bool softmax, int num_selected, float? ratio, int block_size, "
    "int num_sink_blocks, int num_recent_blocks, bool per_head, float sm_scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.retrieve_blocks",
)
