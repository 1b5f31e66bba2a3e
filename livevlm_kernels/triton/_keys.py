# SPDX-License-Identifier: Apache-2.0
"""Products of a tile of queries with a tile of keys, which are rotated by RoPE as they are read if asked for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_dims(x, row_offset, row_mask, stride_dim, begin, count, TILE_DIM: tl.constexpr):
    """Elements begin..begin + count - 1 of rows; zeros from there to TILE_DIM, and where `row_mask` is false."""
    dim = tl.arange(0, TILE_DIM)
    mask = row_mask[:, None] & (dim < count)[None, :]
    return tl.load(x + row_offset[:, None] + ((begin + dim).to(tl.int64) * stride_dim)[None, :], mask=mask, other=0.0)


@triton.jit
def dot(queries, keys, sums, WIDEN: tl.constexpr):
    """`sums` + queries [M, D] times keys [N, D] transposed. Products of 16-bit values are exact on tensor cores."""
    if WIDEN:
        return tl.dot(queries.to(tl.float32), tl.trans(keys.to(tl.float32)), sums, input_precision="ieee")
    elif keys.dtype == tl.float32:
        # Rotated keys: two 16-bit numbers hold them to about 16 bits of mantissa, at twice the work.
        high = keys.to(queries.dtype)
        low = (keys - high.to(tl.float32)).to(queries.dtype)
        return tl.dot(queries, tl.trans(high), tl.dot(queries, tl.trans(low), sums))
    else:
        return tl.dot(queries, tl.trans(keys), sums)


@triton.jit
def dot_of_dims(
    sums,
    q,
    q_offset,
    q_mask,
    q_stride_dim,
    k,
    k_offset,
    k_mask,
    k_stride_dim,
    cos_sin_cache,
    cache_offset,
    cache_stride_dim,
    begin,
    DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`sums` + what TILE_DIM dimensions from `begin` add; with RoPE, also those that are paired with them."""
    if ROPE:
        half: tl.constexpr = DIM // 2
        count = half - begin
        cos = load_dims(cos_sin_cache, cache_offset, k_mask, cache_stride_dim, begin, count, TILE_DIM)
        sin = load_dims(cos_sin_cache, cache_offset, k_mask, cache_stride_dim, half + begin, count, TILE_DIM)
        first = load_dims(k, k_offset, k_mask, k_stride_dim, begin, count, TILE_DIM).to(tl.float32)
        second = load_dims(k, k_offset, k_mask, k_stride_dim, half + begin, count, TILE_DIM).to(tl.float32)
        query = load_dims(q, q_offset, q_mask, q_stride_dim, begin, count, TILE_DIM)
        sums = dot(query, first * cos - second * sin, sums, WIDEN)
        query = load_dims(q, q_offset, q_mask, q_stride_dim, half + begin, count, TILE_DIM)
        return dot(query, second * cos + first * sin, sums, WIDEN)
    else:
        query = load_dims(q, q_offset, q_mask, q_stride_dim, begin, DIM - begin, TILE_DIM)
        key = load_dims(k, k_offset, k_mask, k_stride_dim, begin, DIM - begin, TILE_DIM)
        return dot(query, key, sums, WIDEN)


@triton.jit
def logits_of(
    q,
    q_offset,
    q_mask,
    q_stride_dim,
    k,
    k_offset,
    k_mask,
    k_stride_dim,
    cos_sin_cache,
    cache_offset,
    cache_stride_dim,
    DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Query rows times key rows. In a loop over either, the compiler loads the rows of the other before the loop."""
    sums = tl.zeros([q_offset.shape[0], k_offset.shape[0]], tl.float32)
    dims: tl.constexpr = DIM // 2 if ROPE else DIM
    if TILE_DIM >= dims:
        sums = dot_of_dims(
            sums, q, q_offset, q_mask, q_stride_dim, k, k_offset, k_mask, k_stride_dim,
            cos_sin_cache, cache_offset, cache_stride_dim, 0, DIM, TILE_DIM, ROPE, WIDEN,
        )  # fmt: skip
    else:
        for begin in range(0, dims, TILE_DIM):
            sums = dot_of_dims(
                sums, q, q_offset, q_mask, q_stride_dim, k, k_offset, k_mask, k_stride_dim,
                cos_sin_cache, cache_offset, cache_stride_dim, begin, DIM, TILE_DIM, ROPE, WIDEN,
            )  # fmt: skip
    return sums


@triton.jit
def cache_rows(positions, token, mask, stride_token, max_position, stride_row):
    """Offsets in `cos_sin_cache` of the positions of tokens, clamped to the cache."""
    position = tl.load(positions + token.to(tl.int64) * stride_token, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(position, 0), max_position - 1) * stride_row
