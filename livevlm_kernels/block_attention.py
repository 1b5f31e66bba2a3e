# SPDX-License-Identifier: Apache-2.0
"""Attention over the blocks of the memory that a table names."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.block_attention import block_attention as _reference


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    q_positions: Tensor | None = None,
    packed: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of ragged queries over keys and values in a pool of blocks.

    Serves decoding (one query), questions (tens) and clips (thousands). The keys of a sequence are counted in the order
    of its table, and the queries are its last tokens: their own keys and values are already in the pool. The layout is
    that of PagedAttention (arXiv 2309.06180); keys are stored un-rotated and rotated as they are read, so that any set
    of blocks can be given any positions.

    Args:
        q: queries of all sequences after one another, `[total_q, num_qo_heads, head_dim]`, float32, float16 or
            bfloat16, any strides; with `cos_sin_cache` un-rotated if `q_positions` is given, else rotated by the
            caller.
        k: pool of keys, `[num_blocks, block_size, num_kv_heads, head_dim]`, dtype of `q`, any strides; `num_qo_heads`
            is a multiple of `num_kv_heads`. Or what `quantize_blocks` gives: float8_e4m3fn, or uint8 with
            `head_dim / 2` bytes a row.
        v: pool of values, shape and dtype of `k`.
        block_table: blocks of each sequence in time order, int32 `[batch, max_blocks]`, or
            `[batch, num_kv_heads, max_blocks]` where every KV head has its own; -1 after the last. A number outside
            0..num_blocks - 1 is a block without keys. A block named twice is attended to twice.
        seq_lens: keys of each sequence in table order, int32 or int64 `[batch]`: all blocks are full but the last. Keys
            that the table has no block for are not seen.
        cu_seqlens_q: where the queries of each sequence start, int32 `[batch + 1]`, from 0 up to at most total_q; rows
            outside of all sequences get zeros. None: every sequence has total_q / batch queries.
        positions: position of each slot of the pool, `[num_blocks, block_size]`, int32 or int64; a slot with a negative
            position is empty and not seen, though it counts in `seq_lens`. Required by `cos_sin_cache`, unless
            `packed`.
        cos_sin_cache: float32 or float16 `[max_position, head_dim]`, head_dim / 2 cosines then as many sines per
            position: keys are rotated (half-split, as in Qwen2) at `positions`, clamped to 0..max_position - 1. Half
            precision halves what has to be read, and errs less than a 16-bit key does. None: no RoPE.
        q_positions: where the queries are rotated, `[total_q]`, int32 or int64; needs `cos_sin_cache`.
        packed: a key's position is its number in table order instead: the memory is read as if nothing had ever been
            left out. `positions`, if given, then only says which slots are empty. Needs `cos_sin_cache`.
        k_scale: scales of quantised keys, contiguous: float32 `[num_blocks, num_kv_heads]` for float8_e4m3fn, pairs in
            float16, `[num_blocks, num_kv_heads, 2, head_dim]`, for uint8. Keys are dequantised as they are
            read, then rotated. Needed by `k` in these dtypes, and only by those.
        v_scale: likewise; `[num_blocks, num_kv_heads]` or `[num_blocks, block_size, num_kv_heads, 2]`.
        sm_scale: factor of the logits, positive; `head_dim ** -0.5` if None.
        causal: query i of n sees the keys up to its own, number seq_len - n + i; otherwise all of them.
        window: see only the last `window` keys up to the query's own, at least 1; needs `causal`. None: no limit.
        return_lse: return the log-sum-exp too, for `merge_states`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        out `[total_q, num_qo_heads, head_dim]` in the dtype of `q`; with `return_lse` the pair `(out, lse)`, lse
        float32 `[total_q, num_qo_heads]`, natural logarithm. A query that sees no key gets zeros and lse -inf. What
        lies in slots that no query of a sequence may see is not read into the result, NaN included. Accumulation in
        float32.

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
        BackendError: the backend asked for is not available.
    """
    quantized = attention.pools(k, v, k_scale, v_scale)
    num_blocks, block_size, num_kv_heads, head_dim = k.shape
    check.tensor("q", q, ndim=3)
    total_q, num_qo_heads = q.shape[:2]
    if quantized:
        head_dim *= 2 if k.dtype == torch.uint8 else 1
        check.dtype("q", q, check.FLOATS)
        check.same_device("q", q, "k", k)
        check.shape("q", q, (total_q, num_qo_heads, head_dim), "[total_q, num_qo_heads, head_dim]")
        attention.scales(q, k, k_scale, v_scale)
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    else:
        attention.like("q", q, "k", k, (total_q, num_qo_heads, head_dim), "[total_q, num_qo_heads, head_dim]")
    attention.not_empty("q", q)
    attention.group("q", num_qo_heads, num_kv_heads)

    check.tensor("block_table", block_table, min_ndim=2)
    check.dtype("block_table", block_table, (torch.int32,))
    check.same_device("block_table", block_table, "k", k)
    attention.not_empty("block_table", block_table)
    batch, max_blocks = block_table.shape[0], block_table.shape[-1]
    if block_table.dim() != 2:
        meaning = "[batch, max_blocks] or [batch, num_kv_heads, max_blocks]"
        check.shape("block_table", block_table, (batch, num_kv_heads, max_blocks), meaning)
    check.tensor("seq_lens", seq_lens, ndim=1)
    lens = check.seq_lens(seq_lens, batch, "block_table", block_table)
    if cu_seqlens_q is not None:
        check.tensor("cu_seqlens_q", cu_seqlens_q)
        check.dtype("cu_seqlens_q", cu_seqlens_q, (torch.int32,))
        check.same_device("cu_seqlens_q", cu_seqlens_q, "q", q)
        check.shape("cu_seqlens_q", cu_seqlens_q, (batch + 1,), "[batch + 1]")
    elif total_q % batch:
        raise ArgumentError(
            f"q has total_q = {total_q} rows; without cu_seqlens_q allowed: multiples of batch = {batch}"
        )
    attention.per_token(
        "positions", positions, check.INTS, "k", k, (num_blocks, block_size), "[num_blocks, block_size]"
    )
    if cos_sin_cache is not None and positions is None and not packed:
        raise ArgumentError("cos_sin_cache was given without positions; RoPE at read needs them, or packed=True")
    attention.cos_sin_cache(cos_sin_cache, head_dim, "k", k, (torch.float32, torch.float16))
    q_positions = attention.per_token("q_positions", q_positions, check.INTS, "q", q, (total_q,), "[total_q]")
    if cos_sin_cache is None and (packed or q_positions is not None):
        raise ArgumentError(f"{'packed' if packed else 'q_positions'} was given without cos_sin_cache")
    if window is not None:
        check.at_least("window", window, 1)
        if not causal:
            raise ArgumentError(f"window={window} needs causal=True: it counts back from the query's own key")
    out, lse = overload("block_attention", backend, k.device)(
        q,
        k,
        v,
        block_table,
        lens,
        cu_seqlens_q,
        positions,
        cos_sin_cache,
        q_positions,
        packed,
        attention.scale(sm_scale, head_dim),
        causal,
        window or 0,
        k_scale,
        v_scale,
    )
    return (out, lse) if return_lse else out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    q_positions: Tensor | None,
    packed: bool,
    sm_scale: float,
    causal: bool,
    window: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


define(
    "block_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q, Tensor? positions, "
    "Tensor? cos_sin_cache, Tensor? q_positions, bool packed, float sm_scale, bool causal, int window, "
    "Tensor? k_scale, Tensor? v_scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.block_attention",
)
