# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `quantize_blocks`; arguments are documented in `livevlm_kernels/quantize_blocks.py`.

Codes are computed in integers, so that a GPU without fp8 instructions, and the interpreter, make the same ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def e4m3_of(x):
    """Nearest, ties to even, up to 448; 0 for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Below 2^-6, a multiple of 2^-9: adding 2^14, whose last bit is worth just that, rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    return tl.where(x == x, sign | tl.where(size < 0.015625, small, large), 0).to(tl.uint8)


@triton.jit
def int4_of(steps):
    """Nearest, ties to even; 0 for NaN."""
    steps = tl.where(steps == steps, tl.minimum(tl.maximum(steps, 0.0), 15.0), 0.0)
    return ((steps + 8388608.0).to(tl.int32, bitcast=True) & 15).to(tl.int32)


@triton.jit
def quantize_blocks_kernel(
    k,
    v,
    positions,
    k_codes,
    v_codes,
    k_scale,
    v_scale,
    num_blocks,
    positions_stride,
    k_strides,
    v_strides,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INT4: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: keys and values of one block and head, of which TILE_DIM channels are in each of two parts.
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = number // num_blocks
    block = number % num_blocks
    slots = positions + batch * positions_stride + block * BLOCK_SIZE
    quantize_side(
        k + batch * k_strides[0] + block * k_strides[1] + head * k_strides[3], k_strides, slots, k_codes, k_scale,
        number, head, True, HEADS, DIM, BLOCK_SIZE, INT4, HAS_POSITIONS, TILE_TOKENS, TILE_DIM,
    )  # fmt: skip
    quantize_side(
        v + batch * v_strides[0] + block * v_strides[1] + head * v_strides[3], v_strides, slots, v_codes, v_scale,
        number, head, False, HEADS, DIM, BLOCK_SIZE, INT4, HAS_POSITIONS, TILE_TOKENS, TILE_DIM,
    )  # fmt: skip


@triton.jit
def load_part(x, strides, slots, token, begin, count, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM):
    """Channels begin..begin + count - 1 of tokens, and which tokens are there; zeros for others."""
    dim = tl.arange(0, TILE_DIM)
    there = token < BLOCK_SIZE
    if HAS_POSITIONS:
        there = there & (tl.load(slots + token, mask=there, other=-1) >= 0)
    mask = there[:, None] & (dim < count)[None, :]
    offset = token.to(tl.int64)[:, None] * strides[2] + (begin + dim).to(tl.int64)[None, :] * strides[4]
    return tl.load(x + offset, mask=mask, other=0.0).to(tl.float32), there, mask


@triton.jit
def least(x, mask, axis: tl.constexpr):
    """NaN if any is; +inf of nothing. A reduction would leave NaN out."""
    poisoned = tl.max(tl.where(mask & (x != x), 1, 0), axis) > 0
    return tl.where(poisoned, float("nan"), tl.min(tl.where(mask & (x == x), x, float("inf")), axis))


@triton.jit
def quantize_side(
    x,
    strides,
    slots,
    codes,
    scale,
    number,
    head,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INT4: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    first: tl.constexpr = (DIM + 1) // 2
    second: tl.constexpr = DIM - first
    dim = tl.arange(0, TILE_DIM)
    row = codes + (number * BLOCK_SIZE * HEADS + head) * (first if INT4 else DIM)
    step: tl.constexpr = HEADS * (first if INT4 else DIM)
    if INT4:
        low_a = tl.full([TILE_DIM], float("inf"), tl.float32)
        low_b = low_a
        high_a = -low_a
        high_b = -low_a
        if KEYS:
            for start in range(0, BLOCK_SIZE, TILE_TOKENS):
                token = start + tl.arange(0, TILE_TOKENS)
                a, _, mask = load_part(x, strides, slots, token, 0, first, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM)
                b, _, mask = load_part(x, strides, slots, token, first, second, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM)
                low_a = tl.minimum(low_a, least(a, mask, 0), propagate_nan=tl.PropagateNan.ALL)
                low_b = tl.minimum(low_b, least(b, mask, 0), propagate_nan=tl.PropagateNan.ALL)
                high_a = tl.maximum(high_a, -least(-a, mask, 0), propagate_nan=tl.PropagateNan.ALL)
                high_b = tl.maximum(high_b, -least(-b, mask, 0), propagate_nan=tl.PropagateNan.ALL)
            pairs = scale + (number * HEADS + head) * DIM * 2 + dim
            scale_a, low_a = store_pairs(pairs, DIM, low_a, high_a, dim < first)
            scale_b, low_b = store_pairs(pairs + first, DIM, low_b, high_b, dim < second)
        for start in range(0, BLOCK_SIZE, TILE_TOKENS):
            token = start + tl.arange(0, TILE_TOKENS)
            a, there, mask = load_part(x, strides, slots, token, 0, first, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM)
            b, _, _ = load_part(x, strides, slots, token, first, second, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM)
            if KEYS:
                a = int4_of(tl.div_rn(a - low_a[None, :], tl.broadcast_to(scale_a[None, :], a.shape)))
                b = int4_of(tl.div_rn(b - low_b[None, :], tl.broadcast_to(scale_b[None, :], b.shape)))
            else:
                low = tl.minimum(least(a, mask, 1), least(b, mask, 1), propagate_nan=tl.PropagateNan.ALL)
                high = -tl.minimum(least(-a, mask, 1), least(-b, mask, 1), propagate_nan=tl.PropagateNan.ALL)
                pairs = scale + ((number * BLOCK_SIZE + token) * HEADS + head) * 2
                scale_v, low = store_pairs(pairs, 1, low, high, token < BLOCK_SIZE)
                a = int4_of(tl.div_rn(a - low[:, None], tl.broadcast_to(scale_v[:, None], a.shape)))
                b = int4_of(tl.div_rn(b - low[:, None], tl.broadcast_to(scale_v[:, None], b.shape)))
            both = tl.where(there[:, None], a | (b << 4), 0).to(tl.uint8)
            inside = (token < BLOCK_SIZE)[:, None] & (dim < first)[None, :]
            tl.store(row + token.to(tl.int64)[:, None] * step + dim[None, :], both, mask=inside)
    else:
        most = tl.full([TILE_DIM], 0.0, tl.float32)
        for start in range(0, BLOCK_SIZE, TILE_TOKENS):
            token = start + tl.arange(0, TILE_TOKENS)
            for part in tl.static_range(2):
                count = first if part == 0 else second
                a, _, mask = load_part(
                    x, strides, slots, token, part * first, count, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM
                )
                most = tl.maximum(most, -least(-tl.abs(a), mask, 0), propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(-least(-most, most >= -1.0, 0), 0.0)
        poisoned = tl.max(tl.where(most != most, 1, 0), 0) > 0
        own = tl.div_rn(tl.where(poisoned, float("nan"), largest), 448.0)
        tl.store(scale + number * HEADS + head, own)
        for start in range(0, BLOCK_SIZE, TILE_TOKENS):
            token = start + tl.arange(0, TILE_TOKENS)
            for part in tl.static_range(2):
                count = first if part == 0 else second
                a, there, mask = load_part(
                    x, strides, slots, token, part * first, count, BLOCK_SIZE, HAS_POSITIONS, TILE_DIM
                )
                byte = e4m3_of(tl.div_rn(a, tl.zeros_like(a) + own))
                byte = tl.where(there[:, None], byte, 0).to(tl.uint8)
                inside = (token < BLOCK_SIZE)[:, None] & (dim < count)[None, :]
                tl.store(row + token.to(tl.int64)[:, None] * step + part * first + dim[None, :], byte, mask=inside)


@triton.jit
def store_pairs(pairs, apart, low, high, mask):
    """Rounds scales and minima to float16; zeros where there was nothing. Returns what they are then."""
    none = low > high
    step = tl.where(none, 0.0, tl.div_rn(high - low, tl.zeros_like(low) + 15.0)).to(tl.float16)
    low = tl.where(none, 0.0, low).to(tl.float16)
    tl.store(pairs, step, mask=mask)
    tl.store(pairs + apart, low, mask=mask)
    return step.to(tl.float32), low.to(tl.float32)


def quantize_blocks(
    k: Tensor, v: Tensor, positions: Tensor | None, int4: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [B, N, S, H, D], positions [B or 1, N, S] -> codes uint8 [B, N, S, H, D or D / 2], scales or pairs."""
    batch, num_blocks, block_size, num_kv_heads, head_dim = k.shape
    rows = (batch, num_blocks, block_size, num_kv_heads)
    codes = [
        torch.empty((*rows, head_dim // 2 if int4 else head_dim), dtype=torch.uint8, device=k.device) for _ in range(2)
    ]
    if int4:
        k_scale = torch.empty((batch, num_blocks, num_kv_heads, 2, head_dim), dtype=torch.float16, device=k.device)
        v_scale = torch.empty((*rows, 2), dtype=torch.float16, device=k.device)
    else:
        k_scale, v_scale = (
            torch.empty((batch, num_blocks, num_kv_heads), dtype=torch.float32, device=k.device) for _ in range(2)
        )
    tile_dim = triton.next_power_of_2((head_dim + 1) // 2)
    tile_tokens = min(triton.next_power_of_2(block_size), max(1, 2048 // tile_dim))
    shared = positions is None or positions.shape[0] == 1
    with torch.cuda.device_of(k):
        quantize_blocks_kernel[(batch * num_blocks, num_kv_heads)](
            k, v, positions if positions is not None else k, *codes, k_scale, v_scale, num_blocks,
            0 if shared else num_blocks * block_size, k.stride(), v.stride(),
            HEADS=num_kv_heads, DIM=head_dim, BLOCK_SIZE=block_size, INT4=int4,
            HAS_POSITIONS=positions is not None, TILE_TOKENS=tile_tokens, TILE_DIM=tile_dim,
        )  # fmt: skip
    return codes[0], codes[1], k_scale, v_scale
