# SPDX-License-Identifier: Apache-2.0
"""Keys and values of quantised pools, widened as they are read: in integers, so on every GPU and interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

FLOATS, FP8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # formats of a pool


@triton.jit
def from_e4m3(code):
    """float32 of e4m3, which must not be NaN."""
    bits = code.to(tl.int32)
    scaled = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return scaled * 1.329227995784916e36  # 2^120: float32's exponent is biased by 120 more


@triton.jit
def pair_of(pairs, apart, mask):
    """Scales and minima, float32."""
    scale = tl.load(pairs, mask=mask, other=0.0).to(tl.float32)
    return scale, tl.load(pairs + apart, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_code_halves(
    k,
    offset,
    there,
    stride_dim,
    k_scale,
    row,
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
    """As `load_halves`, of keys in blocks and heads of number `row` in `k_scale`; rounded to `kind` at the end."""
    half: tl.constexpr = (DIM + 1) // 2
    dim = begin + tl.arange(0, TILE)
    mask = there[:, None] & (dim < half)[None, :]
    mask_second = there[:, None] & (dim < DIM - half)[None, :]
    source = k + offset[:, None] + (dim.to(tl.int64) * stride_dim)[None, :]
    codes = tl.load(source, mask=mask, other=0)
    if FORMAT == 2:
        pairs = k_scale + (row * DIM * 2)[:, None] + dim[None, :]
        scale, low = pair_of(pairs, DIM, mask)
        first = (codes & 15).to(tl.float32) * scale + low
        scale, low = pair_of(pairs + half, DIM, mask_second)
        second = (codes >> 4).to(tl.float32) * scale + low
    else:
        scale = tl.load(k_scale + row, mask=there, other=0.0)[:, None]
        codes_second = tl.load(source + half * stride_dim, mask=mask_second, other=0)
        first = from_e4m3(codes) * scale
        second = from_e4m3(codes_second) * scale
    if ROTATE:
        angles = cos_sin_cache + cache_offset[:, None] + (dim.to(tl.int64) * cache_stride_dim)[None, :]
        cos = tl.load(angles, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(angles + half * cache_stride_dim, mask=mask, other=0.0).to(tl.float32)
        a = first
        first = a * cos - second * sin
        second = second * cos + a * sin
    return first.to(kind), second.to(kind)


@triton.jit
def load_code_values(
    v,
    offset,
    there,
    stride_dim,
    v_scale,
    row,
    kind: tl.constexpr,
    DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Rows of values, rounded to `kind`; `row`: of a block and head, or of a token and head, in `v_scale`."""
    dim = tl.arange(0, TILE_DIM)
    mask = there[:, None] & (dim < DIM)[None, :]
    if FORMAT == 2:
        half: tl.constexpr = DIM // 2
        byte = tl.where(dim < half, dim, dim - half).to(tl.int64)
        codes = tl.load(v + offset[:, None] + (byte * stride_dim)[None, :], mask=mask, other=0).to(tl.int32)
        scale, low = pair_of(v_scale + row * 2, 1, there)
        steps = (codes >> tl.where(dim < half, 0, 4)[None, :]) & 15
        values = tl.where(mask, steps.to(tl.float32) * scale[:, None] + low[:, None], 0.0)
    else:
        codes = tl.load(v + offset[:, None] + (dim.to(tl.int64) * stride_dim)[None, :], mask=mask, other=0)
        values = from_e4m3(codes) * tl.load(v_scale + row, mask=there, other=0.0)[:, None]
    return values.to(kind)
