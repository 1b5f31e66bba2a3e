# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `select_tokens`; arguments are documented in `livevlm_kernels/select_tokens.py`.

Every token gets an integer key in the order of scores, and a row keeps its `budget` largest keys. With buckets, the
phase that takes a token stands in the bits above its score: 3 first, 2 second, 1 for what fills up; key 0 is never
taken. The second phase needs no walk: it takes a token exactly if fewer than `bucket_capacity` tokens of its bucket are
better.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._order import RANK_OF_INFINITY, among_largest, rank_of, write_largest
from livevlm_kernels.triton._radix import nth_largest, split_rows, start_of_chunk, tile_of


@triton.jit
def bucket_of(
    token,
    mask,
    length,
    buckets,
    num_buckets,
    stride_token,
    EXPLICIT: tl.constexpr,
):
    """Bucket of each token, -1 if it is in none."""
    if EXPLICIT:
        bucket = tl.load(buckets + token * stride_token, mask=mask, other=-1).to(tl.int64)
        return tl.where((bucket >= 0) & (bucket < num_buckets), bucket, -1)
    else:
        return tl.where(mask, token * num_buckets // tl.maximum(length, 1), -1)


@triton.jit
def order_kernel(
    scores,
    seq_lens,
    buckets,
    keys,
    best,
    seq_len,
    num_buckets,
    num_tiles,
    stride_batch,
    stride_token,
    buckets_stride_batch,
    buckets_stride_token,
    HAS_SEQ_LENS: tl.constexpr,
    EXPLICIT: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: the keys of TILE tokens of a row. `best` is, for MEMBERS == "one", the best token of every bucket,
    # score above (complemented) index; for "sorted", keys that sort the tokens by bucket and then by score.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    token = (program % num_tiles) * TILE + tl.arange(0, TILE)
    length = tl.full([], seq_len, tl.int64)
    if HAS_SEQ_LENS:
        length = tl.minimum(length, tl.load(seq_lens + batch).to(tl.int64))
    score = tl.load(scores + batch * stride_batch + token * stride_token, mask=token < length, other=float("-inf"))
    rank = rank_of(score.to(tl.float32))
    tl.store(keys + batch * seq_len + token, rank, mask=token < seq_len)
    if MEMBERS != "none":
        row = buckets + batch * buckets_stride_batch
        bucket = bucket_of(token, rank > 0, length, row, num_buckets, buckets_stride_token, EXPLICIT)
        if MEMBERS == "one":
            packed = (rank << 31) | (0x7FFFFFFF - token)
            tl.atomic_max(best + batch * num_buckets + bucket, packed, mask=bucket >= 0, sem="relaxed")
        else:
            packed = tl.where(bucket >= 0, (bucket << 32) | (0xFFFFFFFF - rank), -1)
            tl.store(best + batch * seq_len + token, packed, mask=token < seq_len)


@triton.jit
def mark_members_kernel(grouped, order, marks, seq_len, capacity, num_tiles, TILE: tl.constexpr):
    # `grouped` are the keys of tokens sorted by bucket, best first: a token is among the `capacity` best of its bucket
    # exactly if the one `capacity` places before it is in another bucket.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    place = (program % num_tiles) * TILE + tl.arange(0, TILE)
    inside = place < seq_len
    row = grouped + batch * seq_len
    bucket = tl.load(row + place, mask=inside, other=-1) >> 32
    before = tl.load(row + place - capacity, mask=inside & (place >= capacity), other=-1) >> 32
    token = tl.load(order + batch * seq_len + place, mask=inside, other=0)
    member = (bucket >= 0) & (bucket != before)
    tl.store(marks + batch * seq_len + token, member.to(tl.int8), mask=inside)


@triton.jit
def phase_kernel(
    keys,
    seq_lens,
    buckets,
    best,
    digits,
    before,
    seq_len,
    num_top,
    num_buckets,
    num_chunks,
    buckets_stride_batch,
    buckets_stride_token,
    HAS_SEQ_LENS: tl.constexpr,
    EXPLICIT: tl.constexpr,
    MEMBERS: tl.constexpr,
    NONE_FIRST: tl.constexpr,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: adds the phase to the keys of one row; if rows are LONG, of one chunk of a row.
    batch = tl.program_id(0).to(tl.int64)
    keys += batch * seq_len
    length = tl.full([], seq_len, tl.int64)
    if HAS_SEQ_LENS:
        length = tl.minimum(length, tl.load(seq_lens + batch).to(tl.int64))
    seen = tl.full([], 0, tl.int32)
    if NONE_FIRST:
        value = tl.full([], RANK_OF_INFINITY, tl.int64)
        num_equal = tl.full([], 0, tl.int32)
    elif LONG:
        value, num_equal, seen, _ = start_of_chunk(digits, before, batch, num_top, num_chunks, 24)
    else:
        value, num_equal = nth_largest(keys, seq_len, num_top, 24, TILE)
    if value == RANK_OF_INFINITY:  # +inf is always taken first
        num_equal = tl.full([], seq_len, tl.int32)
        seen = tl.full([], 0, tl.int32)
    begin = tl.program_id(1) * CHUNK
    for first in range(begin, tl.minimum(begin + CHUNK, seq_len), TILE):
        token = first + tl.arange(0, TILE).to(tl.int64)
        inside = token < seq_len
        rank = tl.load(keys + token, mask=inside, other=0)
        in_first, seen = among_largest(rank, value, num_equal, seen)
        if MEMBERS == "one":
            row = buckets + batch * buckets_stride_batch
            bucket = bucket_of(token, rank > 0, length, row, num_buckets, buckets_stride_token, EXPLICIT)
            winner = tl.load(best + batch * num_buckets + bucket, mask=bucket >= 0, other=-1)
            member = winner == ((rank << 31) | (0x7FFFFFFF - token))
        else:
            member = tl.load(best + batch * seq_len + token, mask=inside, other=0) != 0
        phase = tl.where(in_first, 3, tl.where(member, 2, 1)).to(tl.int64)
        tl.store(keys + token, tl.where(rank > 0, (phase << 32) | rank, 0), mask=inside)


def select_tokens(
    scores: Tensor,
    seq_lens: Tensor | None,
    buckets: Tensor | None,
    budget: int,
    num_top: int,
    num_buckets: int,
    bucket_capacity: int,
) -> tuple[Tensor, Tensor]:
    """scores [B, L] -> indices [B, budget], counts [B]."""
    batch, seq_len = scores.shape
    device = scores.device
    keys = torch.empty((batch, seq_len), dtype=torch.int64, device=device)
    if buckets is None:
        num_buckets = min(num_buckets, seq_len)  # from there on, every token has a bucket of its own
    members = "none" if num_top >= budget else "one" if bucket_capacity == 1 and num_buckets <= seq_len else "sorted"
    best = keys
    if members == "one":
        best = torch.zeros((batch, num_buckets), dtype=torch.int64, device=device)
    elif members == "sorted":
        best = torch.empty_like(keys)
    lens = seq_lens if seq_lens is not None else keys
    bucket, bucket_strides = (keys, (0, 0)) if buckets is None else (buckets, buckets.stride())
    options = {"HAS_SEQ_LENS": seq_lens is not None, "EXPLICIT": buckets is not None, "MEMBERS": members}
    tile, num_warps = tile_of(seq_len)
    wide = min(tile, 1024)
    num_tiles = triton.cdiv(seq_len, wide)
    with torch.cuda.device_of(scores):
        order_kernel[(batch * num_tiles,)](
            scores,
            lens,
            bucket,
            keys,
            best,
            seq_len,
            num_buckets,
            num_tiles,
            *scores.stride(),
            *bucket_strides,
            **options,
            TILE=wide,
        )
        if members == "sorted":
            grouped, order = torch.sort(best, dim=-1, stable=True)
            best = torch.empty((batch, seq_len), dtype=torch.int8, device=device)
            capacity = min(bucket_capacity, seq_len)
            mark_members_kernel[(batch * num_tiles,)](grouped, order, best, seq_len, capacity, num_tiles, TILE=wide)
        if members != "none":
            rows = split_rows(keys, max(num_top, 1), 24)
            phase_kernel[(batch, rows.num_chunks)](
                keys,
                lens,
                bucket,
                best,
                rows.digits,
                rows.before,
                seq_len,
                max(num_top, 1),
                num_buckets,
                rows.num_chunks,
                *bucket_strides,
                **options,
                NONE_FIRST=num_top == 0,
                LONG=rows.num_chunks > 1,
                CHUNK=rows.chunk,
                TILE=tile,
                num_warps=num_warps,
            )
        return write_largest(keys, budget, 32 if members != "none" else 24)
