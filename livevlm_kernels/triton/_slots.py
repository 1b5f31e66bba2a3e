# SPDX-License-Identifier: Apache-2.0
"""Where in the pools the keys of a sequence lie."""

from __future__ import annotations

import triton
import triton.language as tl

FLAT_TILE = 256  # keys of a program, a multiple of every tile of keys


@triton.jit
def cache_offset_of(position, max_position, stride_row):
    """Offsets of positions in `cos_sin_cache`, clamped to it."""
    return tl.minimum(tl.maximum(position.to(tl.int64), 0), max_position - 1) * stride_row


@triton.jit
def slots_of(
    token,
    there,
    table,
    positions,
    table_stride_block,
    k_strides,
    v_strides,
    cache_stride_row,
    num_blocks,
    max_position,
    BLOCK_SIZE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROPE: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
):
    """Offsets of keys, of values and in the cache, and which tokens of those `there` have a slot that is in use."""
    block = tl.load(table + (token // BLOCK_SIZE).to(tl.int64) * table_stride_block, mask=there, other=-1)
    there = there & (block >= 0) & (block < num_blocks)
    block = block.to(tl.int64)
    slot = (token % BLOCK_SIZE).to(tl.int64)
    where_from = token
    if HAS_POSITIONS:
        position = tl.load(positions + block * BLOCK_SIZE + slot, mask=there, other=-1)
        there = there & (position >= 0)
        if not PACKED:
            where_from = position
    k_offset = block * k_strides[0] + slot * k_strides[1]
    v_offset = k_offset
    if not SAME:
        v_offset = block * v_strides[0] + slot * v_strides[1]
    cache_offset = slot
    if ROPE:
        cache_offset = cache_offset_of(where_from, max_position, cache_stride_row)
    return k_offset, v_offset, cache_offset, there


@triton.jit(do_not_specialize=("num_blocks", "max_blocks", "max_position"))
def flatten_kernel(
    block_table,
    seq_lens,
    positions,
    flat,
    num_blocks,
    max_blocks,
    max_position,
    length,
    table_strides,
    k_strides,
    v_strides,
    cache_strides,
    BLOCK_SIZE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROPE: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: TILE keys of one table. flat[lane, 0, token] is the offset of a key, -1 if there is none;
    # flat[lane, 1, token] that of its cosines; flat[lane, 2, token] that of the value, if it is not the SAME.
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    end = tl.minimum(tl.load(seq_lens + sequence), max_blocks * BLOCK_SIZE).to(tl.int32)
    if tl.program_id(0) * TILE >= end:
        return
    table = block_table + sequence * table_strides[0] + head * table_strides[1]
    k_offset, v_offset, cache_offset, there = slots_of(
        token, token < end, table, positions, table_strides[2], k_strides, v_strides, cache_strides[0],
        num_blocks, max_position, BLOCK_SIZE, HAS_POSITIONS, ROPE, PACKED, SAME,
    )  # fmt: skip
    target = flat + (sequence * tl.num_programs(2) + head) * 3 * length + token
    tl.store(target, tl.where(there, k_offset, -1))
    if ROPE:
        tl.store(target + length, tl.where(there, cache_offset, 0))
    if not SAME:
        tl.store(target + 2 * length, tl.where(there, v_offset, 0))
