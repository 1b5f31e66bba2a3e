# SPDX-License-Identifier: Apache-2.0
"""The inner loop of `block_attention`: what a range of keys adds to the attention of a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from livevlm_kernels.triton._codes import load_code_halves, load_code_values
from livevlm_kernels.triton._slots import slots_of


@triton.jit
def load_rows(x, offset, mask, stride_dim, begin, count, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Elements begin..begin + count - 1 of rows; zeros from there to TILE, unless WHOLE, and where `mask` is false."""
    dim = tl.arange(0, TILE)
    mask = mask[:, None]
    if not WHOLE:
        mask = mask & (dim < count)[None, :]
    return tl.load(x + offset[:, None] + ((begin + dim).to(tl.int64) * stride_dim)[None, :], mask=mask, other=0.0)


@triton.jit
def load_halves(
    x,
    offset,
    mask,
    stride_dim,
    cos_sin_cache,
    cache_offset,
    cache_stride_dim,
    begin,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """TILE dimensions from `begin` of the first half of rows, and those of the second half that RoPE pairs them with;
    rotated in float32. Zeros where `mask` is false and past either half."""
    half: tl.constexpr = (DIM + 1) // 2
    whole: tl.constexpr = half % TILE == 0 and DIM % 2 == 0
    count = half - begin
    first = load_rows(x, offset, mask, stride_dim, begin, count, whole, TILE)
    second = load_rows(x, offset, mask, stride_dim, half + begin, DIM - half - begin, whole, TILE)
    if ROTATE:
        cos = load_rows(cos_sin_cache, cache_offset, mask, cache_stride_dim, begin, count, whole, TILE).to(tl.float32)
        sin = load_rows(cos_sin_cache, cache_offset, mask, cache_stride_dim, half + begin, count, whole, TILE)
        sin = sin.to(tl.float32)
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        first = (a * cos - b * sin).to(x.dtype.element_ty)  # rounded as a stock model rounds what it has rotated
        second = (b * cos + a * sin).to(x.dtype.element_ty)
    return first, second


@triton.jit
def load_key_halves(
    k,
    offset,
    there,
    stride_dim,
    k_scale,
    scale_row,
    cos_sin_cache,
    cache_offset,
    cache_stride_dim,
    begin,
    kind: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    if FORMAT:
        return load_code_halves(
            k, offset, there, stride_dim, k_scale, scale_row, cos_sin_cache, cache_offset, cache_stride_dim, begin,
            kind, DIM, TILE, FORMAT, ROTATE,
        )  # fmt: skip
    else:
        return load_halves(
            k, offset, there, stride_dim, cos_sin_cache, cache_offset, cache_stride_dim, begin, DIM, TILE, ROTATE
        )


@triton.jit
def dot(a, b, sums, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums)


@triton.jit
def attend(
    state,
    begin,
    finish,
    low,
    stop,
    row_begin,
    row_end,
    q,
    q_first,
    q_second,
    q_offset,
    q_mask,
    q_stride_dim,
    q_cache_offset,
    k,
    k_strides,
    v,
    v_strides,
    k_scale,
    v_scale,
    head,
    table,
    flat,
    flat_length,
    positions,
    cos_sin_cache,
    cache_strides,
    table_stride_block,
    num_blocks,
    max_position,
    scale_log2,
    MASKED: tl.constexpr,
    FLAT: tl.constexpr,
    FORMAT: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROPE: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    ROTATE_QUERIES: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """What keys begin..finish - 1 add to `state`: largest logit (base 2), sum of weights, weighted sum of values.

    Keys low..stop - 1 are read. MASKED: a row sees row_begin..row_end - 1 of them. Otherwise all rows see all, and if
    FLAT, there are no keys that are not between the two.
    """
    half: tl.constexpr = (DIM + 1) // 2
    top, total, sums = state
    for first in range(begin, finish, TILE_KEYS):
        token = first + tl.arange(0, TILE_KEYS)
        if FLAT:
            source = flat + token
            k_offset = tl.load(source)
            there = k_offset >= 0
            if MASKED:
                there = there & (token >= low) & (token < stop)
            k_offset = tl.multiple_of(k_offset, ALIGN)
            cache_offset = tl.multiple_of(tl.load(source + flat_length), ALIGN) if ROPE else k_offset
            v_offset = k_offset if SAME else tl.multiple_of(tl.load(source + 2 * flat_length), ALIGN)
        else:
            k_offset, v_offset, cache_offset, there = slots_of(
                token, (token >= low) & (token < stop), table, positions, table_stride_block, k_strides, v_strides,
                cache_strides[0], num_blocks, max_position, BLOCK_SIZE, HAS_POSITIONS, ROPE, PACKED, SAME,
            )  # fmt: skip
        scale_row = k_offset
        if FORMAT:
            block = tl.load(table + (token // BLOCK_SIZE).to(tl.int64) * table_stride_block, mask=there, other=0)
            scale_row = block.to(tl.int64) * HEADS + head
        logits = tl.zeros([q_offset.shape[0], TILE_KEYS], tl.float32)
        if TILE_HALF >= half:
            k_first, k_second = load_key_halves(
                k, k_offset, there, k_strides[3], k_scale, scale_row, cos_sin_cache, cache_offset, cache_strides[1], 0,
                q.dtype.element_ty, DIM, TILE_HALF, FORMAT, ROPE,
            )  # fmt: skip
            logits = dot(q_first, tl.trans(k_first), logits, WIDEN)
            logits = dot(q_second, tl.trans(k_second), logits, WIDEN)
        else:
            for dim in range(0, half, TILE_HALF):
                k_first, k_second = load_key_halves(
                    k, k_offset, there, k_strides[3], k_scale, scale_row, cos_sin_cache, cache_offset,
                    cache_strides[1], dim, q.dtype.element_ty, DIM, TILE_HALF, FORMAT, ROPE,
                )  # fmt: skip
                q_left, q_right = load_halves(
                    q, q_offset, q_mask, q_stride_dim, cos_sin_cache, q_cache_offset, cache_strides[1], dim,
                    DIM, TILE_HALF, ROTATE_QUERIES,
                )  # fmt: skip
                logits = dot(q_left, tl.trans(k_first), logits, WIDEN)
                logits = dot(q_right, tl.trans(k_second), logits, WIDEN)
        logits = logits * scale_log2 + tl.where(there, 0.0, float("-inf"))[None, :]
        if MASKED:
            seen = (token[None, :] >= row_begin[:, None]) & (token[None, :] < row_end[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: -inf - -inf would be NaN
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(weights, 1)
        if FORMAT:
            if FORMAT == 2:
                slot = (token % BLOCK_SIZE).to(tl.int64)
                scale_row = (block.to(tl.int64) * BLOCK_SIZE + slot) * HEADS + head
            values = load_code_values(
                v, v_offset, there, v_strides[3], v_scale, scale_row, q.dtype.element_ty, DIM, TILE_DIM, FORMAT
            )
        else:
            values = load_rows(v, v_offset, there, v_strides[3], 0, DIM, DIM == TILE_DIM, TILE_DIM)
        sums = dot(weights.to(values.dtype), values, sums * rescale[:, None], WIDEN)
        top = new_top
    return top, total, sums
