# SPDX-License-Identifier: Apache-2.0
"""Last kernel of `block_attention`: combines the splits of a row, and clears rows that belong to no sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from livevlm_kernels.triton._sequences import CHUNK, sequences_from

SPLITS: tl.constexpr = tl.constexpr(16)  # loaded at once


def rows_at_once(interpreted: bool) -> int:
    """Rows of a program: one, for the few rows of a decoding step are to be served by many programs."""
    return 128 if interpreted else 1


@triton.jit(do_not_specialize=("batch", "total_q", "num_queries", "capacity"))
def combine_kernel(
    seq_lens,
    cu_seqlens_q,
    part_out,
    part_lse,
    out,
    lse,
    batch,
    total_q,
    num_queries,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    SHARE: tl.constexpr,
    SMALL: tl.constexpr,
    MEDIUM: tl.constexpr,
    LARGE: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program: ROWS rows of the result. Where their parts are follows from all sequences before their own.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total_q.to(tl.int64) * (HEADS * GROUP)
    query = (row // (HEADS * GROUP)).to(tl.int32)
    start = tl.zeros([ROWS], tl.int32)
    tile_rows = tl.zeros([ROWS], tl.int32)
    num_splits = tl.zeros([ROWS], tl.int32)  # 0: of no sequence
    num_tiles = tl.zeros([ROWS], tl.int32)
    scratch = tl.zeros([ROWS], tl.int64)
    for first in range(0, batch, CHUNK):
        _, starts, stops, tile, tiles, splits, room = sequences_from(
            first, cu_seqlens_q, seq_lens, batch, num_queries, capacity, RAGGED, GROUP, SMALL, MEDIUM, LARGE, SHARE
        )
        here = (starts[None, :] <= query[:, None]) & (query[:, None] < stops[None, :])
        start += tl.sum(tl.where(here, starts[None, :], 0), 1)
        tile_rows += tl.sum(tl.where(here, tile[None, :], 0), 1)
        num_splits += tl.sum(tl.where(here, splits[None, :], 0), 1)
        num_tiles += tl.sum(tl.where(here, tiles[None, :], 0), 1)
        scratch += tl.sum(tl.where(stops[None, :] <= query[:, None], room[None, :], 0), 1)

    head = (row % (HEADS * GROUP)).to(tl.int32)
    inner = (query - start) * GROUP + head % GROUP  # number of the row in its sequence and KV head
    tile_rows = tl.maximum(tile_rows, 1)
    place = (num_tiles - 1 - inner // tile_rows) * num_splits  # of its tile among the items of its sequence
    source = scratch + place.to(tl.int64) * tile_rows + inner % tile_rows
    count = tl.where(inside & (num_splits > 1), num_splits, 0)
    most = tl.max(count)
    dim = tl.arange(0, TILE_DIM)
    number = tl.arange(0, SPLITS)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, most, SPLITS):
        split = first + number[None, :]
        part = (source[:, None] + split * tile_rows[:, None]) * HEADS + (head // GROUP)[:, None]
        log_sum = tl.load(part_lse + part, mask=split < count[:, None], other=float("-inf"))
        top = tl.maximum(top, tl.max(log_sum, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, TILE_DIM], tl.float32)
    for first in range(0, most, SPLITS):
        split = first + number[None, :]
        part = (source[:, None] + split * tile_rows[:, None]) * HEADS + (head // GROUP)[:, None]
        log_sum = tl.load(part_lse + part, mask=split < count[:, None], other=float("-inf"))
        weight = tl.exp2(log_sum - base[:, None])
        mask = (log_sum > float("-inf"))[:, :, None] & (dim < DIM)[None, None, :]
        values = tl.load(part_out + (part * DIM)[:, :, None] + dim[None, None, :], mask=mask, other=0.0)
        total += tl.sum(weight, 1)
        sums += tl.sum(values * weight[:, :, None], 1)

    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    write = inside & (num_splits != 1)
    tl.store(lse + row, (base + tl.log2(total)) * 0.6931471805599453, mask=write)
    mask = write[:, None] & (dim < DIM)[None, :]
    tl.store(out + (row * DIM)[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=mask)
