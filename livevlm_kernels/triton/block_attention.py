# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `block_attention`; arguments are documented in `livevlm_kernels/block_attention.py`.

A tile of rows has one of three sizes; each that may occur is a launch, in which every program finds its sequence. For
all but the smallest, a first kernel looks up where keys are. A last kernel combines splits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from livevlm_kernels.triton._attention_kernel import block_attention_kernel
from livevlm_kernels.triton._combine import combine_kernel, rows_at_once
from livevlm_kernels.triton._interpreter import INTERPRETED
from livevlm_kernels.triton._sequences import PROGRAMS, Tile, bounds
from livevlm_kernels.triton._slots import FLAT_TILE, flatten_kernel


def tiles_of(
    head_dim: int, dtype: torch.dtype, quantized: bool = False
) -> tuple[dict[str, int], tuple[Tile, Tile, Tile]]:
    """Sizes of the dimensions as kernel constants, and the tiles for few, some and many rows."""
    half = max(16, triton.next_power_of_2((head_dim + 1) // 2))
    dim = max(16, triton.next_power_of_2(head_dim))
    if INTERPRETED:
        return {"TILE_HALF": half, "TILE_DIM": dim}, (Tile(16, 128, 4, 1), Tile(16, 128, 4, 1), Tile(256, 128, 4, 1))
    if dtype == torch.float32:  # without tensor cores: operands must fit into registers
        return {"TILE_HALF": 16, "TILE_DIM": dim}, (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(32, 32, 4, 1))
    # Three stages are two buffers of keys and values, and a third of what `flatten_kernel` wrote.
    few, some = Tile(16, 64 if dim < 256 else 32, 4, 3), Tile(64, 64 if dim < 128 else 32, 4 if dim < 256 else 8, 3)
    tiles = few, some, Tile(128, 64 if dim < 256 else 32, 8, 3)
    if quantized:  # codes take more registers
        few, some, many = (tile._replace(keys=tile.keys // 2) for tile in tiles)
        tiles = few, some, many
    return {"TILE_HALF": half, "TILE_DIM": dim}, tiles


def alignment(*steps: int) -> int:
    """The largest power of two, up to 16, that divides all of these."""
    divisor = math.gcd(16, *steps)
    return divisor & -divisor


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    q_positions: Tensor | None,
    packed: bool,
    sm_scale: float,
    causal: bool,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [Q, Hq, D], pools [N, S, H, D], block_table [B, (H,) M] -> out [Q, Hq, D], lse [Q, Hq]; window 0: none."""
    num_blocks, block_size, num_kv_heads, _ = k.shape
    total_q, num_qo_heads, head_dim = q.shape
    batch, max_blocks = block_table.shape[0], block_table.shape[-1]
    group, capacity = num_qo_heads // num_kv_heads, max_blocks * block_size
    table = block_table if block_table.dim() == 3 else block_table[:, None]
    cache_strides = cos_sin_cache.stride() if cos_sin_cache is not None else (0, 0)
    max_position = cos_sin_cache.shape[0] if cos_sin_cache is not None else 1
    lens = (seq_lens, cu_seqlens_q.contiguous() if cu_seqlens_q is not None else seq_lens)
    rope = [x if x is not None else k for x in (positions, cos_sin_cache, q_positions)]
    scales = [x if x is not None else k for x in (k_scale, v_scale)]
    form = 0 if k_scale is None else 2 if k_scale.dim() == 4 else 1  # see _codes.py

    constants, tiles = tiles_of(head_dim, q.dtype, form > 0)
    share = max(1, (4 if INTERPRETED else PROGRAMS) // num_kv_heads)
    constants |= {"SMALL": tiles[0].rows, "MEDIUM": tiles[1].rows, "LARGE": tiles[2].rows, "SHARE": share}
    constants |= {"HEADS": num_kv_heads, "GROUP": group, "DIM": head_dim, "RAGGED": cu_seqlens_q is not None}
    slots: dict[str, Any] = {
        "BLOCK_SIZE": block_size,
        "HAS_POSITIONS": positions is not None,
        "ROPE": cos_sin_cache is not None,
    }
    slots |= {"PACKED": packed, "SAME": k.stride()[:2] == v.stride()[:2]}
    options: dict[str, Any] = {"ROTATE_QUERIES": q_positions is not None, "CAUSAL": causal, "WINDOW": window > 0}
    options |= {"WIDEN": INTERPRETED or q.dtype == torch.float32, "PER_HEAD": block_table.dim() == 3}
    options |= {"ALIGN": alignment(*k.stride()[:2], *v.stride()[:2], cache_strides[0])}

    need = bounds(tiles, total_q * group, batch, cu_seqlens_q is not None, capacity, share)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((total_q, num_qo_heads), **floats)
    part_out = torch.empty((need.scratch, num_kv_heads, head_dim), **floats)
    part_lse = torch.empty((need.scratch, num_kv_heads), **floats)
    # A sequence of few rows finds its keys itself: another launch would take longer.
    # The scales of quantised ones are found by block.
    flatten = form == 0 and any(tile.rows > tiles[0].rows for tile, _ in need.items)
    flat_length = triton.cdiv(capacity, FLAT_TILE) * FLAT_TILE
    flat = torch.empty((batch, table.shape[1], 3, flat_length if flatten else 0), dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        if flatten:
            flatten_kernel[(flat_length // FLAT_TILE, batch, table.shape[1])](
                table, seq_lens, rope[0], flat, num_blocks, max_blocks, max_position, flat_length, table.stride(),
                k.stride(), v.stride(), cache_strides, **slots, TILE=FLAT_TILE,
            )  # fmt: skip
        for tile, items in need.items:
            block_attention_kernel[(items, num_kv_heads)](
                q, k, v, table, *lens, *rope, *scales, flat, out, lse, part_out, part_lse,
                batch, total_q, total_q // batch, num_blocks, max_blocks, max_position, flat_length, window,
                sm_scale * math.log2(math.e), q.stride(), k.stride(), v.stride(), table.stride(), cache_strides,
                **constants, **slots, **options, FLAT=form == 0 and tile.rows > tiles[0].rows, FORMAT=form,
                TILE_ROWS=tile.rows, TILE_KEYS=tile.keys, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if need.scratch or cu_seqlens_q is not None:
            rows = rows_at_once(INTERPRETED)
            combine_kernel[(triton.cdiv(total_q * num_qo_heads, rows),)](
                *lens, part_out, part_lse, out, lse, batch, total_q, total_q // batch, capacity, **constants, ROWS=rows
            )
    return out, lse
