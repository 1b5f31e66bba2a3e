# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `merge_tokens`; arguments are documented in `livevlm_kernels/merge_tokens.py`.

Tokens are sorted by the row they go to, stably, so that every row of the result is the sum of one run in token order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._nearest import nearest_survivors

IN_FLIGHT = 8  # tokens loaded before the first is used


@triton.jit
def group_kernel(
    groups,
    nearest,
    seq_lens,
    targets,
    seq_len,
    num_groups,
    num_tiles,
    stride_batch,
    stride_token,
    HAS_GROUPS: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: the row that each of TILE tokens goes to, `num_groups` if it is dropped.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    token = (program % num_tiles) * TILE + tl.arange(0, TILE)
    inside = token < seq_len
    if HAS_GROUPS:
        group = tl.load(groups + batch * stride_batch + token * stride_token, mask=inside, other=-1)
    else:
        best = tl.load(nearest + batch * seq_len + token, mask=inside, other=0)
        group = tl.where(best > 0, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1).to(tl.int32)
    kept = inside & (group >= 0) & (group < num_groups)
    if HAS_SEQ_LENS:
        kept = kept & (token < tl.load(seq_lens + batch))
    tl.store(targets + batch * seq_len + token, tl.where(kept, group, num_groups).to(tl.int32), mask=inside)


@triton.jit
def merge_runs_kernel(
    k,
    v,
    order,
    bounds,
    sizes,
    weights,
    k_out,
    v_out,
    sizes_out,
    seq_len,
    num_groups,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    sizes_stride_batch,
    sizes_stride_token,
    weights_stride_batch,
    weights_stride_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    # One program: TILE_HEADS heads of one row of the result.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_groups
    group = program % num_groups
    begin = tl.load(bounds + batch * (num_groups + 1) + group)
    count = (tl.load(bounds + batch * (num_groups + 1) + group + 1) - begin).to(tl.int32)
    run = order + batch * seq_len + begin
    head = tl.program_id(1).to(tl.int64) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    dim = tl.arange(0, TILE_DIM)[None, :].to(tl.int64)
    inside = (head < HEADS) & (dim < DIM)
    key_of = k + batch * k_stride_batch + head * k_stride_head + dim * k_stride_dim
    value_of = v + batch * v_stride_batch + head * v_stride_head + dim * v_stride_dim
    keys = tl.zeros([TILE_HEADS, TILE_DIM], tl.float32)
    values = tl.zeros([TILE_HEADS, TILE_DIM], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, count, IN_FLIGHT):
        for i in tl.static_range(IN_FLIGHT):  # unrolled: the loads do not wait for the sums, which keep token order
            here = first + i < count
            token = tl.load(run + first + i, mask=here, other=0)
            weight = tl.where(here, 1.0, 0.0)
            if HAS_SIZES:
                weight *= tl.load(sizes + batch * sizes_stride_batch + token * sizes_stride_token, mask=here, other=0.0)
            if HAS_WEIGHTS:
                place = batch * weights_stride_batch + token * weights_stride_token
                weight *= tl.load(weights + place, mask=here, other=0.0)
            mask = inside & here
            keys += weight * tl.load(key_of + token * k_stride_token, mask=mask, other=0.0).to(tl.float32)
            values += weight * tl.load(value_of + token * v_stride_token, mask=mask, other=0.0).to(tl.float32)
            total += weight
    divisor = tl.zeros([TILE_HEADS, TILE_DIM], tl.float32) + tl.where(total == 0, 1.0, total)
    target = program * (HEADS * DIM) + head * DIM + dim
    tl.store(k_out + target, tl.where(total == 0, 0.0, tl.div_rn(keys, divisor)), mask=inside)
    tl.store(v_out + target, tl.where(total == 0, 0.0, tl.div_rn(values, divisor)), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sizes_out + program, total)


def merge_tokens(
    k: Tensor,
    v: Tensor,
    groups: Tensor | None,
    indices: Tensor | None,
    sizes: Tensor | None,
    weights: Tensor | None,
    seq_lens: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, L, H, D] -> k_out, v_out [B, num_groups, H, D], sizes_out [B, num_groups]."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    device = k.device
    lens = seq_lens if seq_lens is not None else k
    targets = torch.empty((batch, seq_len), dtype=torch.int32, device=device)
    k_out = torch.empty((batch, num_groups, num_kv_heads, head_dim), dtype=k.dtype, device=device)
    v_out = torch.empty_like(k_out)
    sizes_out = torch.empty((batch, num_groups), dtype=torch.float32, device=device)
    tile = min(triton.next_power_of_2(seq_len), 1024)
    num_tiles = triton.cdiv(seq_len, tile)
    tile_dim = triton.next_power_of_2(head_dim)
    tile_heads = max(1, min(triton.next_power_of_2(num_kv_heads), 1024 // tile_dim))
    with torch.cuda.device_of(k):
        nearest = targets if indices is None else nearest_survivors(k, indices, seq_lens)
        group_kernel[(batch * num_tiles,)](
            groups if groups is not None else targets,
            nearest,
            lens,
            targets,
            seq_len,
            num_groups,
            num_tiles,
            *(groups.stride() if groups is not None else (0, 0)),
            HAS_GROUPS=groups is not None,
            HAS_SEQ_LENS=seq_lens is not None,
            TILE=tile,
        )
        grouped, order = torch.sort(targets, dim=-1, stable=True)
        bounds = torch.arange(num_groups + 1, dtype=torch.int32, device=device).expand(batch, -1).contiguous()
        bounds = torch.searchsorted(grouped, bounds)
        merge_runs_kernel[(batch * num_groups, triton.cdiv(num_kv_heads, tile_heads))](
            k,
            v,
            order,
            bounds,
            sizes if sizes is not None else sizes_out,
            weights if weights is not None else sizes_out,
            k_out,
            v_out,
            sizes_out,
            seq_len,
            num_groups,
            *k.stride(),
            *v.stride(),
            *(sizes.stride() if sizes is not None else (0, 0)),
            *(weights.stride() if weights is not None else (0, 0)),
            HEADS=num_kv_heads,
            DIM=head_dim,
            HAS_SIZES=sizes is not None,
            HAS_WEIGHTS=weights is not None,
            TILE_HEADS=tile_heads,
            TILE_DIM=tile_dim,
            IN_FLIGHT=IN_FLIGHT,
            num_warps=min(4, max(1, tile_heads * tile_dim * k.element_size() // 512)),
        )
    return k_out, v_out, sizes_out
