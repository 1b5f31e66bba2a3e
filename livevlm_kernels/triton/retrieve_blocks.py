# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `retrieve_blocks`; arguments are documented in `livevlm_kernels/retrieve_blocks.py`.

A softmax over blocks is what `score_tokens` computes, with summaries for keys: it divides by the number of rows, which
changes no order. Scores then become integers in the same order, of which a radix search finds the largest.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._block_scores import block_scores
from livevlm_kernels.triton._order import RANK_OF_INFINITY, among_largest, rank_of
from livevlm_kernels.triton._radix import nth_largest, tile_of
from livevlm_kernels.triton.score_tokens import score_tokens

MEAN, MINMAX, MASS = range(3)


@triton.jit
def valid_blocks(seq_lens, batch, entries, block_size, HAS_SEQ_LENS: tl.constexpr):
    length = tl.full([], entries, tl.int32)
    if HAS_SEQ_LENS:
        length = tl.minimum(tl.maximum(tl.load(seq_lens + batch), 0), length).to(tl.int32)
    return (length + block_size - 1) // block_size


@triton.jit
def rank_kernel(
    scores,
    seq_lens,
    keys,
    entries,
    num_blocks,
    block_size,
    num_tiles,
    num_sink_blocks,
    num_recent_blocks,
    HEADS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    # One program: the keys of TILE_BLOCKS blocks of a row, from the scores of their tokens (themselves, if block_size
    # is 1), in one KV head or all. A key is 0 where a block cannot be selected.
    program = tl.program_id(0).to(tl.int64)
    row = program // num_tiles
    batch = row // HEADS if PER_HEAD else row
    block = (program % num_tiles) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    num_valid = valid_blocks(seq_lens, batch, entries, block_size, HAS_SEQ_LENS)
    score = tl.zeros([TILE_BLOCKS], tl.float32)
    source = scores + row * (1 if PER_HEAD else HEADS) * entries
    for _ in range(0, 1 if PER_HEAD else HEADS):
        for first in range(0, block_size, TILE_TOKENS):
            inner = first + tl.arange(0, TILE_TOKENS)[None, :]
            token = (block * block_size)[:, None] + inner
            mask = (inner < block_size) & (token < entries) & (block < num_valid)[:, None]
            score += tl.sum(tl.load(source + token, mask=mask, other=0.0), 1)
        source += entries
    rank = rank_of(score)  # of NaN and -inf: 0
    rank = tl.where((block < num_sink_blocks) | (block >= num_valid - num_recent_blocks), RANK_OF_INFINITY, rank)
    tl.store(keys + row * num_blocks + block, tl.where(block < num_valid, rank, 0), mask=block < num_blocks)


@triton.jit
def table_kernel(
    keys,
    seq_lens,
    block_table,
    counts,
    entries,
    num_blocks,
    block_size,
    num_selected,
    num_always,
    ratio_bits,
    HEADS: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: one row of the table, which has HEADS rows for a sequence.
    row = tl.program_id(0).to(tl.int64)
    keys += row * num_blocks
    block_table += row * num_selected
    num_valid = valid_blocks(seq_lens, row // HEADS, entries, block_size, HAS_SEQ_LENS)
    width = tl.minimum(num_valid, num_selected)
    if HAS_RATIO:
        # In float64, and 1e-6 less, as in the reference: 0.07 of 100 blocks are 7.
        ratio = (tl.full([], 0, tl.int64) + ratio_bits).to(tl.float64, bitcast=True)
        share = num_valid.to(tl.float64) * ratio - 1e-6
        floor = share.to(tl.int32)  # towards zero: share is above -1
        ceil = floor + (share > floor.to(tl.float64)).to(tl.int32)
        width = tl.minimum(width, tl.maximum(ceil, num_always))
    value, num_equal = nth_largest(keys, num_blocks, width, 24, TILE)
    seen = tl.full([], 0, tl.int32)
    written = tl.full([], 0, tl.int32)
    for first in range(0, num_blocks, TILE):
        block = first + tl.arange(0, TILE)
        key = tl.load(keys + block, mask=block < num_blocks, other=0)
        taken, seen = among_largest(key, value, num_equal, seen)
        taken = taken & (width > 0)
        place = written + tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(block_table + place, block, mask=taken)
        written += tl.sum(taken.to(tl.int32))
    for first in range(written, num_selected, TILE):
        place = first + tl.arange(0, TILE)
        tl.store(block_table + place, tl.full([TILE], -1, tl.int32), mask=place < num_selected)
    tl.store(counts + row, written)


def scores_of(q: Tensor, keys: Tensor, seq_lens: Tensor | None, kind: int, softmax: bool, sm_scale: float) -> Tensor:
    """q [B, R, Hq, D], keys [B, N, (2,) H, D] -> [B, H, N], of tokens for "mass"."""
    if not softmax:
        return block_scores(q, keys, seq_lens, kind == MINMAX)
    if kind == MINMAX:
        # Quest's bound is one dot product: of (negative part, positive part) of q with (low, high).
        q = q.float()
        q = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1)
        keys = keys.float().transpose(2, 3).flatten(3)
    elif q.dtype != keys.dtype:
        q, keys = q.float(), keys.float()
    return score_tokens(q, keys, seq_lens, None, None, sm_scale, False, True, 1)


def retrieve_blocks(
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
    """q [B, R, Hq, D], keys [B, N, (2,) H, D] -> block_table [B, (H,) num_selected], counts [B, (H)]."""
    batch, entries, num_kv_heads = keys.shape[0], keys.shape[1], keys.shape[-2]
    num_blocks = triton.cdiv(entries, block_size)
    shape = (batch, num_kv_heads) if per_head else (batch,)
    rows = batch * (num_kv_heads if per_head else 1)
    ranks = torch.empty((rows, num_blocks), dtype=torch.int64, device=keys.device)
    block_table = torch.empty((*shape, num_selected), dtype=torch.int32, device=keys.device)
    counts = torch.empty(shape, dtype=torch.int32, device=keys.device)
    lens = seq_lens if seq_lens is not None else ranks
    tile_tokens = min(triton.next_power_of_2(block_size), 1024)
    tile_blocks = min(triton.next_power_of_2(num_blocks), 1024 // tile_tokens)
    num_tiles = triton.cdiv(num_blocks, tile_blocks)
    tile, num_warps = tile_of(num_blocks)
    # A double goes to a kernel as its bits: as a float it would be rounded.
    bits = struct.unpack("q", struct.pack("d", ratio))[0] if ratio is not None else 0
    with torch.cuda.device_of(keys):
        scores = scores_of(q, keys, seq_lens, kind, softmax or kind == MASS, sm_scale)
        rank_kernel[(rows * num_tiles,)](
            scores,
            lens,
            ranks,
            entries,
            num_blocks,
            block_size,
            num_tiles,
            num_sink_blocks,
            num_recent_blocks,
            HEADS=num_kv_heads,
            PER_HEAD=per_head,
            HAS_SEQ_LENS=seq_lens is not None,
            TILE_BLOCKS=tile_blocks,
            TILE_TOKENS=tile_tokens,
        )
        table_kernel[(rows,)](
            ranks,
            lens,
            block_table,
            counts,
            entries,
            num_blocks,
            block_size,
            num_selected,
            num_sink_blocks + num_recent_blocks,
            bits,
            HEADS=num_kv_heads if per_head else 1,
            HAS_RATIO=ratio is not None,
            HAS_SEQ_LENS=seq_lens is not None,
            TILE=tile,
            num_warps=num_warps,
        )
    return block_table, counts
