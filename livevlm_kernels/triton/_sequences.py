# SPDX-License-Identifier: Apache-2.0
"""How `block_attention` divides its work: which sequence, rows and keys a program has, found on the device.

The queries and heads of a sequence that share a KV head are the rows of one matrix: row r is query r // GROUP, head
r % GROUP. A sequence of few rows takes the smallest tile that holds them, and its keys are split over several programs.
Both follow from the sequence's own queries and keys, so that nothing else in the batch changes a result.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

MIN_KEYS: tl.constexpr = tl.constexpr(128)  # of a split: with fewer, combining takes longer than it saves
CHUNK: tl.constexpr = tl.constexpr(32)  # sequences that a program looks at, at once
PROGRAMS = 132  # that a sequence is split into: one for each multiprocessor of an H100. A constant, whatever the GPU


class Tile(NamedTuple):
    """Rows and keys that a program handles at once, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit
def plan(rows, keys, SMALL: tl.constexpr, MEDIUM: tl.constexpr, LARGE: tl.constexpr, SHARE: tl.constexpr):
    """Rows of a tile, tiles, and splits of the keys of each tile, for a sequence with so many rows and keys.

    SHARE is PROGRAMS over KV heads. One tile gets two programs a multiprocessor, since they mostly wait for memory.
    Many tiles get one, or two if that would leave too many multiprocessors idle.
    """
    tile_rows = tl.where(rows <= SMALL, SMALL, tl.where(rows <= MEDIUM, MEDIUM, LARGE))
    tiles = (rows + tile_rows - 1) // tile_rows
    splits = 2 * SHARE // tl.maximum(tiles, 1)
    splits = tl.where((rows > MEDIUM) & (splits >= 4), splits // 2, splits)
    return tile_rows, tiles, tl.maximum(tl.minimum(splits, (keys + MIN_KEYS - 1) // MIN_KEYS), 1)


@triton.jit
def sequences_from(
    first,
    cu_seqlens_q,
    seq_lens,
    batch,
    num_queries,
    capacity,
    RAGGED: tl.constexpr,
    GROUP: tl.constexpr,
    SMALL: tl.constexpr,
    MEDIUM: tl.constexpr,
    LARGE: tl.constexpr,
    SHARE: tl.constexpr,
):
    """CHUNK sequences: number, first query and the one after the last, `plan`, rows of scratch memory."""
    sequence = first + tl.arange(0, CHUNK)
    valid = sequence < batch
    if RAGGED:
        start = tl.load(cu_seqlens_q + sequence, mask=valid, other=0)
        stop = tl.load(cu_seqlens_q + sequence + 1, mask=valid, other=0)
    else:
        start = sequence * num_queries
        stop = tl.where(valid, start + num_queries, start)
    keys = tl.minimum(tl.load(seq_lens + sequence, mask=valid, other=0), capacity).to(tl.int32)
    tile_rows, tiles, splits = plan((stop - start) * GROUP, keys, SMALL, MEDIUM, LARGE, SHARE)
    room = tl.where(splits > 1, tiles * splits * tile_rows, 0).to(tl.int64)
    return sequence, start, stop, tile_rows, tiles, splits, room


@triton.jit
def find_item(
    item,
    cu_seqlens_q,
    seq_lens,
    batch,
    num_queries,
    capacity,
    RAGGED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SMALL: tl.constexpr,
    MEDIUM: tl.constexpr,
    LARGE: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Of the items of work with tiles of TILE_ROWS, the sequence of number `item`, -1 if there are not so many; also
    its number among the items of the sequence, and the first row of the sequence in scratch memory."""
    which = tl.full([], -1, tl.int32)
    place = tl.full([], 0, tl.int32)
    scratch = tl.full([], 0, tl.int64)
    for first in range(0, batch, CHUNK):
        sequence, _, _, tile_rows, tiles, splits, room = sequences_from(
            first, cu_seqlens_q, seq_lens, batch, num_queries, capacity, RAGGED, GROUP, SMALL, MEDIUM, LARGE, SHARE
        )
        items = tl.where(tile_rows == TILE_ROWS, tiles * splits, 0)
        own = item - tl.cumsum(items) + items
        here = (own >= 0) & (own < items)  # of one sequence at most
        which += tl.sum(tl.where(here, sequence + 1, 0))
        place += tl.sum(tl.where(here, own, 0))
        scratch += tl.sum(tl.where((which < 0) | (sequence < which), room, 0))
        item -= tl.sum(items)  # below 0 once the sequence is found
    return which, place, scratch


class Bounds(NamedTuple):
    """What a call can need at most; how much it is, only the device knows."""

    items: list[tuple[Tile, int]]  # of each tile that may be in use
    scratch: int  # rows, 0: no sequence is split


def bounds(tiles: tuple[Tile, Tile, Tile], rows: int, batch: int, ragged: bool, capacity: int, share: int) -> Bounds:
    """For `rows` rows in all, in sequences of the same length unless `ragged`. `tiles`: SMALL <= MEDIUM < LARGE."""
    items, scratch, fewest = [], 0, 1
    most_splits = min(2 * share, triton.cdiv(capacity, MIN_KEYS.value))
    for tile in tiles:
        most = tile.rows if tile is not tiles[-1] else rows  # rows of a sequence
        each = rows // batch
        if fewest > most or (not ragged and not fewest <= each <= most) or rows < fewest:
            continue
        sequences = min(batch, rows // fewest)
        split = min(2 * share, triton.cdiv(most, tile.rows) * most_splits)  # items of a sequence that is split
        whole = rows // tile.rows + sequences if tile is tiles[-1] else 0  # and of all that are not
        if not ragged:
            num_tiles = triton.cdiv(each, tile.rows)
            split, whole = (split, 0) if num_tiles <= share and most_splits > 1 else (0, batch * num_tiles)
        items.append((tile, sequences * split + whole))
        scratch += sequences * split * tile.rows if most_splits > 1 else 0
        fewest = tile.rows + 1
    return Bounds(items, scratch)
