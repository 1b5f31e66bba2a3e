# SPDX-License-Identifier: Apache-2.0
"""First pass of `score_tokens`: maximum of the logits of each row and sum of their exponentials."""

from __future__ import annotations

import triton
import triton.language as tl

from livevlm_kernels.triton._keys import cache_rows, logits_of


@triton.jit
def rows_of_queries(
    q,
    seq_lens,
    batch,
    head,
    first_row,
    num_rows,
    seq_len,
    num_queries,
    stride_batch,
    stride_query,
    stride_head,
    GROUP: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Offsets of a tile of rows, and the end of the keys that each of them sees: 0 for a row past the last."""
    row = first_row + tl.arange(0, TILE_ROWS)
    query = (row // GROUP).to(tl.int64)
    offset = batch * stride_batch + query * stride_query + (head * GROUP + row % GROUP) * stride_head
    length = tl.full([], seq_len, tl.int32)
    if HAS_SEQ_LENS:
        length = tl.minimum(length, tl.maximum(tl.load(seq_lens + batch), 0))
    end = tl.zeros([TILE_ROWS], tl.int32) + length
    if CAUSAL:
        end += query.to(tl.int32) + 1 - num_queries
    return offset, tl.where(row < num_rows, end, 0), length


@triton.jit
def row_sums_kernel(
    q,
    k,
    seq_lens,
    positions,
    cos_sin_cache,
    tops,
    sums,
    num_rows,
    seq_len,
    num_queries,
    max_position,
    scale_log2,
    num_row_tiles,
    q_stride_batch,
    q_stride_query,
    q_stride_head,
    q_stride_dim,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    positions_stride_batch,
    positions_stride_token,
    cache_stride_row,
    cache_stride_dim,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: TILE_ROWS rows of one KV head over one split of the keys.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_row_tiles // HEADS
    head = program // num_row_tiles % HEADS
    first_row = (program % num_row_tiles).to(tl.int32) * TILE_ROWS
    offset, end, length = rows_of_queries(
        q, seq_lens, batch, head, first_row, num_rows, seq_len, num_queries,
        q_stride_batch, q_stride_query, q_stride_head, GROUP, HAS_SEQ_LENS, CAUSAL, TILE_ROWS,
    )  # fmt: skip
    row = first_row + tl.arange(0, TILE_ROWS)
    key_of = k + batch * k_stride_batch + head * k_stride_head
    position_of = positions + batch * positions_stride_batch
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    begin = tl.program_id(1) * KEYS_PER_SPLIT
    for first in range(begin, tl.minimum(begin + KEYS_PER_SPLIT, length), TILE_KEYS):
        token = first + tl.arange(0, TILE_KEYS)
        inside = token < length
        token_offset = token.to(tl.int64) * k_stride_token
        cache_offset = token_offset
        if ROPE:
            cache_offset = cache_rows(
                position_of, token, inside, positions_stride_token, max_position, cache_stride_row
            )
        logits = logits_of(
            q, offset, row < num_rows, q_stride_dim, key_of, token_offset, inside, k_stride_dim,
            cos_sin_cache, cache_offset, cache_stride_dim, DIM, TILE_DIM, ROPE, WIDEN,
        )  # fmt: skip
        logits = tl.where(token[None, :] < end[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: -inf - -inf would be NaN
        total *= tl.exp2((top - base) * scale_log2)
        total += tl.sum(tl.exp2((logits - base[:, None]) * scale_log2), 1)
        top = new_top
    target = ((program // num_row_tiles) * tl.num_programs(1) + tl.program_id(1)) * num_rows + row
    tl.store(tops + target, top, mask=row < num_rows)
    tl.store(sums + target, total, mask=row < num_rows)


@triton.jit
def combine_kernel(tops, sums, top, share, num_rows, num_splits, scale_log2, TILE: tl.constexpr):
    # One program: maximum of each row of one KV head over all splits, and the weight of exp(logit - maximum).
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = row < num_rows
    source = head * num_splits * num_rows + row
    highest = tl.full([TILE], float("-inf"), tl.float32)
    for split in range(0, num_splits):
        highest = tl.maximum(highest, tl.load(tops + source + split * num_rows, mask=inside, other=float("-inf")))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([TILE], tl.float32)
    for split in range(0, num_splits):
        part = tl.load(tops + source + split * num_rows, mask=inside, other=float("-inf"))
        part_sum = tl.load(sums + source + split * num_rows, mask=inside, other=0.0)
        total += part_sum * tl.exp2((part - highest) * scale_log2)
    tl.store(top + head * num_rows + row, highest, mask=inside)
    tl.store(share + head * num_rows + row, tl.where(total == 0, 0.0, 1 / (total * num_rows)), mask=inside)
