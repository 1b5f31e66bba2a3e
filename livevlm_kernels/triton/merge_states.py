# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `merge_states`; arguments are documented in `livevlm_kernels/merge_states.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_states_kernel(
    outs,
    lses,
    out,
    lse,
    num_parts,
    num_rows,
    outs_stride_part,
    outs_stride_query,
    outs_stride_head,
    outs_stride_dim,
    lses_stride_part,
    lses_stride_query,
    lses_stride_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: TILE_ROWS rows, a row being one head of one query. int64 before anything is multiplied by a stride.
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = row < num_rows
    query = row // HEADS
    head = row % HEADS
    dim = tl.arange(0, TILE_DIM).to(tl.int64)
    lses += query * lses_stride_query + head * lses_stride_head
    source = (query * outs_stride_query + head * outs_stride_head)[:, None] + (dim * outs_stride_dim)[None, :]
    part_step = tl.full([], 0, tl.int64) + outs_stride_part
    lse_step = tl.full([], 0, tl.int64) + lses_stride_part

    top = tl.full([TILE_ROWS], -3.4028234663852886e38, tl.float32)  # not -inf: -inf - -inf would be NaN
    for part in range(0, num_parts):
        log_sum = tl.load(lses + part * lse_step, mask=inside, other=float("-inf"))
        top = tl.maximum(top, log_sum, propagate_nan=tl.PropagateNan.ALL)
    total = tl.zeros([TILE_ROWS], tl.float32)
    sums = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    for part in range(0, num_parts):
        log_sum = tl.load(lses + part * lse_step, mask=inside, other=float("-inf"))
        # The output of an empty part may hold anything, NaN included: it is not read.
        mask = (inside & (log_sum != float("-inf")))[:, None] & (dim < DIM)[None, :]
        value = tl.load(outs + source + part * part_step, mask=mask, other=0.0).to(tl.float32)
        weight = tl.exp2((log_sum - top) * LOG2_E)
        total += weight
        sums += value * weight[:, None]

    some = total != 0
    result = sums / tl.where(some, total, 1.0)[:, None]
    tl.store(lse + row, tl.where(some, top + tl.log(total), float("-inf")), mask=inside)
    target = (row * DIM)[:, None] + dim[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside[:, None] & (dim < DIM)[None, :])


def tile_of(head_dim: int) -> tuple[int, int]:
    """Rows and dimensions of a tile: 8 elements a thread."""
    tile_dim = triton.next_power_of_2(head_dim)
    return max(1, 1024 // tile_dim), tile_dim


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs [P, Q, H, D], lses [P, Q, H] -> out [Q, H, D], lse [Q, H]."""
    num_parts, total_q, num_heads, head_dim = outs.shape
    out = torch.empty((total_q, num_heads, head_dim), dtype=outs.dtype, device=outs.device)
    lse = torch.empty((total_q, num_heads), dtype=torch.float32, device=outs.device)
    num_rows = total_q * num_heads
    tile_rows, tile_dim = tile_of(head_dim)
    with torch.cuda.device_of(outs):
        merge_states_kernel[(triton.cdiv(num_rows, tile_rows),)](
            outs,
            lses,
            out,
            lse,
            num_parts,
            num_rows,
            *outs.stride(),
            *lses.stride(),
            HEADS=num_heads,
            DIM=head_dim,
            TILE_ROWS=tile_rows,
            TILE_DIM=tile_dim,
        )
    return out, lse
