# SPDX-License-Identifier: Apache-2.0
"""The survivor that each evicted token is most similar to: the Triton kernel behind `merge_tokens(indices=...)`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._interpreter import INTERPRETED
from livevlm_kernels.triton._order import rank_of


@triton.jit
def nearest_survivor_kernel(
    k,
    indices,
    seq_lens,
    nearest,
    seq_len,
    num_rows,
    rows_each,
    num_tiles,
    stride_batch,
    stride_token,
    stride_head,
    stride_dim,
    indices_stride_batch,
    indices_stride_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: TILE_TOKENS tokens against `rows_each` survivors. The best is rank of the cosine above complemented
    # row, so that a maximum over programs is exact and the lowest row wins ties, in whatever order they come.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    token = (program % num_tiles) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    length = tl.full([], seq_len, tl.int64)
    if HAS_SEQ_LENS:
        length = tl.minimum(length, tl.load(seq_lens + batch).to(tl.int64))
    valid = token < length
    k += batch * stride_batch
    indices += batch * indices_stride_batch
    dim = tl.arange(0, TILE_DIM).to(tl.int64)
    best = tl.zeros([TILE_TOKENS], tl.int64)
    begin = tl.program_id(1) * rows_each
    for first in range(begin, tl.minimum(begin + rows_each, num_rows), TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        index = tl.load(indices + row.to(tl.int64) * indices_stride_row, mask=row < num_rows, other=-1).to(tl.int64)
        survives = (index >= 0) & (index < length)
        dots = tl.zeros([TILE_TOKENS, TILE_ROWS], tl.float32)
        squares = tl.zeros([TILE_ROWS], tl.float32)
        for step in range(0, HEADS * tl.cdiv(DIM, TILE_DIM)):
            head = step // tl.cdiv(DIM, TILE_DIM)
            column = (step % tl.cdiv(DIM, TILE_DIM)) * TILE_DIM + dim
            offset = tl.full([], head, tl.int64) * stride_head + column * stride_dim
            mine = tl.load(
                k + token[:, None] * stride_token + offset[None, :],
                mask=valid[:, None] & (column < DIM)[None, :],
                other=0.0,
            )
            theirs = tl.load(
                k + index[:, None] * stride_token + offset[None, :],
                mask=survives[:, None] & (column < DIM)[None, :],
                other=0.0,
            )
            wide = theirs.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            if WIDEN:
                dots = tl.dot(mine.to(tl.float32), tl.trans(wide), dots, input_precision="ieee")
            else:
                dots = tl.dot(mine, tl.trans(theirs), dots)
        # The length of the token itself does not change which survivor is nearest.
        norm = tl.sqrt_rn(squares)
        cosine = dots / tl.where(norm == 0, 1.0, norm)[None, :]
        cosine = tl.where(cosine != cosine, 3e38, cosine)  # NaN counts as the maximum, as for torch.argmax
        cosine = tl.where(index[None, :] == token[:, None], float("inf"), cosine)  # a survivor keeps its own row
        cosine = tl.where(survives[None, :], cosine, float("-inf"))
        top, place = tl.max(cosine, 1, return_indices=True)
        rank = rank_of(top)
        packed = (rank << 31) | (0x7FFFFFFF - (first + place).to(tl.int64))
        best = tl.maximum(best, tl.where(rank > 0, packed, 0))
    tl.atomic_max(nearest + batch * seq_len + token, best, mask=valid, sem="relaxed")


def tiles_of(num_rows: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int, bool]:
    """Tokens, survivors and dimensions of a tile, warps, and whether it is multiplied in full float32."""
    widen = INTERPRETED or dtype == torch.float32
    tile_tokens = 64 if widen else 128
    tile_rows = min(max(triton.next_power_of_2(num_rows), 16), tile_tokens)
    tile_dim = min(max(triton.next_power_of_2(head_dim), 16), 32 if widen else 64)
    return tile_tokens, tile_rows, tile_dim, 4 if widen else 8, widen


def nearest_survivors(k: Tensor, indices: Tensor, seq_lens: Tensor | None) -> Tensor:
    """k [B, L, H, D], indices [B, n] -> int64 [B, L], in the low 31 bits the complement of the nearest row; or 0."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    num_rows = indices.shape[1]
    nearest = torch.zeros((batch, seq_len), dtype=torch.int64, device=k.device)
    tile_tokens, tile_rows, tile_dim, num_warps, widen = tiles_of(num_rows, head_dim, k.dtype)
    rows_each = max(tile_rows, 2048)  # enough programs even for one short sequence
    num_tiles = triton.cdiv(seq_len, tile_tokens)
    nearest_survivor_kernel[(batch * num_tiles, triton.cdiv(num_rows, rows_each))](
        k,
        indices,
        seq_lens if seq_lens is not None else k,
        nearest,
        seq_len,
        num_rows,
        rows_each,
        num_tiles,
        *k.stride(),
        *indices.stride(),
        HEADS=num_kv_heads,
        DIM=head_dim,
        HAS_SEQ_LENS=seq_lens is not None,
        WIDEN=widen,
        TILE_TOKENS=tile_tokens,
        TILE_ROWS=tile_rows,
        TILE_DIM=tile_dim,
        num_warps=num_warps,
    )
    return nearest
