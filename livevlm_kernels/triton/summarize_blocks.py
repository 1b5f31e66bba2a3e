# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `summarize_blocks`; arguments are documented in `livevlm_kernels/summarize_blocks.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_FLIGHT = 16  # tokens loaded before the first is used


@triton.jit
def summarize_blocks_kernel(
    k,
    seq_lens,
    first_token,
    out,
    seq_len,
    block_size,
    num_blocks,
    stride_batch,
    stride_token,
    stride_head,
    stride_dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    MINMAX: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    HAS_FIRST_TOKEN: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    # One program: one block of one sequence, TILE_HEADS heads of it. int64 before anything is multiplied by a stride.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_blocks
    block = program % num_blocks
    begin = block * block_size
    if HAS_FIRST_TOKEN:
        if tl.load(first_token + batch) - begin >= block_size:  # ends before the first change
            return
    end = tl.minimum(begin + block_size, seq_len)
    if HAS_SEQ_LENS:
        end = tl.minimum(end, tl.load(seq_lens + batch).to(tl.int64))
    count = tl.maximum(end - begin, 0).to(tl.int32)

    head = tl.program_id(1).to(tl.int64) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    dim = tl.arange(0, TILE_DIM)[None, :].to(tl.int64)
    inside = (head < HEADS) & (dim < DIM)
    source = k + batch * stride_batch + begin * stride_token + head * stride_head + dim * stride_dim

    low = tl.full([TILE_HEADS, TILE_DIM], float("inf") if MINMAX else 0.0, tl.float32)  # the sum, for the mean
    high = tl.full([TILE_HEADS, TILE_DIM], float("-inf"), tl.float32)
    for first in range(0, count, IN_FLIGHT):
        for i in tl.static_range(IN_FLIGHT):  # unrolled: the loads do not wait for the sums, which keep token order
            token = first + i
            key = tl.load(source + token.to(tl.int64) * stride_token, mask=inside & (token < count), other=0.0)
            key = key.to(tl.float32)
            if MINMAX:
                valid = token < count
                low = tl.where(valid, tl.minimum(low, key, propagate_nan=tl.PropagateNan.ALL), low)
                high = tl.where(valid, tl.maximum(high, key, propagate_nan=tl.PropagateNan.ALL), high)
            else:
                low += key  # zero past the end

    row = HEADS * DIM
    target = out + (batch * num_blocks + block) * row * (2 if MINMAX else 1) + head * DIM + dim
    if MINMAX:
        tl.store(target, tl.where(count > 0, low, 0.0), mask=inside)
        tl.store(target + row, tl.where(count > 0, high, 0.0), mask=inside)
    else:
        divisor = tl.full([TILE_HEADS, TILE_DIM], 0.0, tl.float32) + tl.maximum(count, 1).to(tl.float32)
        tl.store(target, tl.div_rn(low, divisor), mask=inside)


def summarize_blocks(
    k: Tensor, seq_lens: Tensor | None, first_token: Tensor | None, block_size: int, minmax: bool, out: Tensor
) -> None:
    """k [B, L, H, D] -> out [B, ceil(L / block_size), (2,) H, D] float32, written in place."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    num_blocks = -(-seq_len // block_size)
    tile_dim = triton.next_power_of_2(head_dim)
    tile_heads = max(1, min(triton.next_power_of_2(num_kv_heads), 2048 // tile_dim))
    num_warps = min(8, max(1, tile_heads * tile_dim * k.element_size() // 512))  # 16 bytes a thread
    grid = (batch * num_blocks, triton.cdiv(num_kv_heads, tile_heads))
    with torch.cuda.device_of(k):
        summarize_blocks_kernel[grid](
            k,
            seq_lens if seq_lens is not None else k,
            first_token if first_token is not None else k,
            out,
            seq_len,
            block_size,
            num_blocks,
            *k.stride(),
            HEADS=num_kv_heads,
            DIM=head_dim,
            TILE_HEADS=tile_heads,
            TILE_DIM=tile_dim,
            MINMAX=minmax,
            HAS_SEQ_LENS=seq_lens is not None,
            HAS_FIRST_TOKEN=first_token is not None,
            IN_FLIGHT=IN_FLIGHT,
            num_warps=num_warps,
        )
