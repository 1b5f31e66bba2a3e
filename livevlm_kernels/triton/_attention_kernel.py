# SPDX-License-Identifier: Apache-2.0
"""Main kernel of `block_attention`: a tile of the rows of one sequence and KV head, over one split of their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from livevlm_kernels.triton._attend import attend, load_halves
from livevlm_kernels.triton._sequences import find_item, plan
from livevlm_kernels.triton._slots import cache_offset_of

# Sizes that change from call to call as a memory grows: a kernel for each that is divisible by 16 gains nothing.
SIZES = ("batch", "total_q", "num_queries", "num_blocks", "max_blocks", "max_position", "window")


@triton.jit(do_not_specialize=SIZES)
def block_attention_kernel(
    q,
    k,
    v,
    block_table,
    seq_lens,
    cu_seqlens_q,
    positions,
    cos_sin_cache,
    q_positions,
    k_scale,
    v_scale,
    flat,
    out,
    lse,
    part_out,
    part_lse,
    batch,
    total_q,
    num_queries,
    num_blocks,
    max_blocks,
    max_position,
    flat_length,
    window,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    table_strides,
    cache_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    FLAT: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROPE: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    ROTATE_QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
    SHARE: tl.constexpr,
    SMALL: tl.constexpr,
    MEDIUM: tl.constexpr,
    LARGE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    capacity = max_blocks * BLOCK_SIZE
    sequence, place, scratch = find_item(
        tl.program_id(0), cu_seqlens_q, seq_lens, batch, num_queries, capacity,
        RAGGED, GROUP, TILE_ROWS, SMALL, MEDIUM, LARGE, SHARE,
    )  # fmt: skip
    if sequence < 0:
        return
    start = sequence * num_queries
    count = num_queries
    if RAGGED:
        start = tl.load(cu_seqlens_q + sequence)
        count = tl.load(cu_seqlens_q + sequence + 1) - start
    length = tl.load(seq_lens + sequence).to(tl.int32)
    limit = tl.minimum(length, capacity)
    _, num_tiles, num_splits = plan(count * GROUP, limit, SMALL, MEDIUM, LARGE, SHARE)
    head = tl.program_id(1).to(tl.int64)
    tile = num_tiles - 1 - place // num_splits  # the last queries see most keys: they go first
    split = place % num_splits

    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    query = start + row // GROUP
    inside = (row < count * GROUP) & (query >= 0) & (query < total_q)
    q_head = head * GROUP + row % GROUP
    q_offset = query.to(tl.int64) * q_strides[0] + q_head * q_strides[1]
    q_cache_offset = q_offset
    if ROTATE_QUERIES:
        position = tl.load(q_positions + query, mask=inside, other=0)
        q_cache_offset = cache_offset_of(position, max_position, cache_strides[0])
    q_first, q_second = load_halves(
        q, q_offset, inside, q_strides[2], cos_sin_cache, q_cache_offset, cache_strides[1], 0,
        DIM, TILE_HALF, ROTATE_QUERIES,
    )  # fmt: skip

    # Keys that some row sees are low..stop - 1, and those before `full` are seen by all rows, if there is no window.
    own = length - count  # key of the sequence's first query
    row_begin = tl.zeros([TILE_ROWS], tl.int32)
    row_end = row_begin + limit
    low = tl.full([], 0, tl.int32)
    stop = limit
    full = limit + TILE_KEYS
    if CAUSAL:
        last_row = tl.minimum(tile * TILE_ROWS + TILE_ROWS, count * GROUP) - 1
        row_end = tl.minimum(own + row // GROUP + 1, limit)
        stop = tl.minimum(own + last_row // GROUP + 1, limit)
        full = own + tile * TILE_ROWS // GROUP + 1
        if WINDOW:
            row_begin = own + row // GROUP + 1 - window
            low = tl.maximum(own + tile * TILE_ROWS // GROUP + 1 - window, 0)
            full = low
    first = low // TILE_KEYS * TILE_KEYS
    each = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), TILE_KEYS), num_splits) * TILE_KEYS
    begin = first + split * each
    finish = tl.minimum(begin + each, stop)
    middle = tl.maximum(tl.minimum(full // TILE_KEYS * TILE_KEYS, finish), begin)

    table = block_table + sequence.to(tl.int64) * table_strides[0]
    lane = sequence.to(tl.int64)
    if PER_HEAD:
        table += head * table_strides[1]
        lane = lane * HEADS + head
    state = (
        tl.full([TILE_ROWS], float("-inf"), tl.float32),
        tl.zeros([TILE_ROWS], tl.float32),
        tl.zeros([TILE_ROWS, TILE_DIM], tl.float32),
    )
    for part in tl.static_range(1 if CAUSAL and WINDOW else 0, 2 if CAUSAL else 1):
        state = attend(
            state, begin if part == 0 or WINDOW else middle, middle if part == 0 else finish, low, stop,
            row_begin, row_end, q, q_first, q_second, q_offset, inside, q_strides[2], q_cache_offset,
            k + head * k_strides[2], k_strides, v + head * v_strides[2], v_strides, k_scale, v_scale, head, table,
            flat + lane * 3 * flat_length, flat_length, positions, cos_sin_cache, cache_strides, table_strides[2],
            num_blocks, max_position, scale_log2, part == 1, FLAT, FORMAT, HEADS, ALIGN, DIM, BLOCK_SIZE,
            HAS_POSITIONS, ROPE, PACKED, SAME, ROTATE_QUERIES, WIDEN, TILE_KEYS, TILE_HALF, TILE_DIM,
        )  # fmt: skip
    top, total, sums = state

    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    log_sum = top + tl.log2(total)  # -inf if nothing was seen
    dim = tl.arange(0, TILE_DIM)
    if num_splits == 1:
        target = query.to(tl.int64) * (HEADS * GROUP) + q_head
        tl.store(lse + target, log_sum * 0.6931471805599453, mask=inside)
        mask = inside[:, None] & (dim < DIM)[None, :]
        tl.store(out + (target * DIM)[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        part_row = scratch + place.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        target = part_row * HEADS + head
        tl.store(part_lse + target, log_sum)
        tl.store(part_out + (target * DIM)[:, None] + dim[None, :], result, mask=(dim < DIM)[None, :])
