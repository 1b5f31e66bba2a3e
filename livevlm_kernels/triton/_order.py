# SPDX-License-Identifier: Apache-2.0
"""Scores as integers that sort like them, and the positions of the largest: shared by the ops that select."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._radix import nth_largest, split_rows, start_of_chunk, tile_of

RANK_OF_INFINITY: tl.constexpr = tl.constexpr(2 * 0x7F800000 + 1)


@triton.jit
def rank_of(score):
    """int64 0..2**32 - 1 in the order of float32 scores, 0.0 and -0.0 equal; 0 for -inf and NaN, which none selects."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers, a higher pattern is the lower number
    return tl.where(score > float("-inf"), ordered.to(tl.int64) + (0x7F800000 + 1), 0)


@triton.jit
def among_largest(key, value, num_equal, seen):
    """Which keys of a tile are among the n largest, and `seen` for the next tile.

    `value` and `num_equal` are from `nth_largest`; of equal keys the first are taken. `seen` counts the equal ones in
    the tiles before. Key 0 is never taken.
    """
    equal = (key == value).to(tl.int32)
    earlier = seen + tl.cumsum(equal) - equal
    taken = (key > value) | ((key == value) & (earlier < num_equal))
    return taken & (key > 0), seen + tl.sum(equal)


@triton.jit
def write_largest_kernel(
    keys,
    indices,
    counts,
    digits,
    before,
    seq_len,
    budget,
    num_chunks,
    TOP_SHIFT: tl.constexpr,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: the positions of the `budget` largest keys of one row, ascending, then -1; and their number. If rows
    # are LONG, of one chunk of a row.
    row = tl.program_id(0).to(tl.int64)
    keys += row * seq_len
    indices += row * budget
    begin = 0
    end = seq_len
    if LONG:
        begin = tl.program_id(1) * CHUNK
        end = tl.minimum(begin + CHUNK, seq_len)
        value, num_equal, seen, above = start_of_chunk(digits, before, row, budget, num_chunks, TOP_SHIFT)
        written = above + tl.where(value > 0, tl.minimum(seen, num_equal), 0)
    else:
        value, num_equal = nth_largest(keys, seq_len, budget, TOP_SHIFT, TILE)
        seen = tl.full([], 0, tl.int32)
        written = tl.full([], 0, tl.int32)
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        key = tl.load(keys + position, mask=position < end, other=0)
        taken, seen = among_largest(key, value, num_equal, seen)
        place = written + tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(indices + place, position.to(tl.int32), mask=taken)
        written += tl.sum(taken.to(tl.int32))
    if end == seq_len:  # the last program of the row
        for first in range(written, budget, TILE):
            place = first + tl.arange(0, TILE)
            tl.store(indices + place, tl.full([TILE], -1, tl.int32), mask=place < budget)
        tl.store(counts + row, written)


def write_largest(keys: Tensor, budget: int, top_shift: int) -> tuple[Tensor, Tensor]:
    """keys [B, L], below 2 ** (top_shift + 8) -> int32 [B, budget] positions of the largest, int32 [B] their number."""
    batch, seq_len = keys.shape
    tile, num_warps = tile_of(seq_len)
    indices = torch.empty((batch, budget), dtype=torch.int32, device=keys.device)
    counts = torch.empty((batch,), dtype=torch.int32, device=keys.device)
    rows = split_rows(keys, budget, top_shift)
    write_largest_kernel[(batch, rows.num_chunks)](
        keys,
        indices,
        counts,
        rows.digits,
        rows.before,
        seq_len,
        budget,
        rows.num_chunks,
        TOP_SHIFT=top_shift,
        LONG=rows.num_chunks > 1,
        CHUNK=rows.chunk,
        TILE=tile,
        num_warps=num_warps,
    )
    return indices, counts
