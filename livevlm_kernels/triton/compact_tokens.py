# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `compact_tokens`; arguments are documented in `livevlm_kernels/compact_tokens.py`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE_BYTES = 32768  # what a program holds in registers between reading and writing
MANY_PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def compact_tokens_kernel(
    tensor,
    indices,
    seq_len,
    num_rows,
    num_columns,
    num_slices,
    num_heads,
    stride_batch,
    stride_token,
    stride_head,
    indices_stride_batch,
    indices_stride_head,
    indices_stride_row,
    sizes,
    strides,
    DIMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    # One program owns a slice of columns of one sequence (one head of it) and nobody else touches these bytes. It walks
    # the rows forward, reading a whole chunk before writing it. Ascending indices name rows at or behind their target,
    # so no chunk reads what an earlier one wrote.
    program = tl.program_id(0).to(tl.int64)
    batch = program // (num_slices * num_heads)
    head = program // num_slices % num_heads
    column = (program % num_slices).to(tl.int32) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    has_column = column < num_columns
    offset = tl.zeros([TILE_COLUMNS], tl.int64)
    rest = column
    for i in tl.static_range(DIMS - 1, 0, -1):
        offset += (rest % sizes[i]).to(tl.int64) * strides[i]
        rest = rest // sizes[i]
    offset += rest.to(tl.int64) * strides[0]

    data = tensor + batch * stride_batch + head * stride_head + offset[None, :]
    index_of = indices + batch * indices_stride_batch + head * indices_stride_head
    row = tl.arange(0, TILE_ROWS).to(tl.int64)
    index = tl.load(index_of + row * indices_stride_row, mask=row < num_rows, other=-1)
    for _ in range(0, num_rows, TILE_ROWS):
        moves = (index >= 0) & (index < seq_len) & (index != row)
        mask = moves[:, None] & has_column[None, :]
        moved = tl.load(data + index.to(tl.int64)[:, None] * stride_token, mask=mask)
        later = row + TILE_ROWS  # on its way while the rows come in
        index = tl.load(index_of + later * indices_stride_row, mask=later < num_rows, other=-1)
        tl.debug_barrier()  # all threads have read
        tl.store(data + row[:, None] * stride_token, moved, mask=mask)
        row = later


def as_integers(x: Tensor, own: int) -> tuple[Tensor, list[int], list[int]]:
    """`x` as integers as wide as its alignment allows, and the sizes and strides of what follows its first `own` dims.

    Which element of a row is which does not matter: dimensions are sorted by stride, and merged where they can be.
    """
    if x.itemsize > 8:
        x = torch.view_as_real(x)  # complex128
    x = x.view(INTEGERS[x.itemsize])
    sizes, strides = [1], [1]
    for d in sorted((d for d in range(own, x.dim()) if x.shape[d] > 1), key=x.stride, reverse=True):
        if strides[-1] == x.stride(d) * x.shape[d] or sizes == [1]:
            sizes[-1] *= x.shape[d]
            strides[-1] = x.stride(d)
        else:
            sizes.append(x.shape[d])
            strides.append(x.stride(d))
    flat = x.as_strided((*x.shape[:own], *sizes), (*x.stride()[:own], *strides))
    for width in (8, 4, 2):
        factor = width // x.itemsize
        steps = (*flat.stride()[:-1], sizes[-1], flat.storage_offset())
        if factor > 1 and strides[-1] == 1 and x.data_ptr() % width == 0 and not any(n % factor for n in steps):
            flat = flat.view(INTEGERS[width])
            break
    return flat, list(flat.shape[own:]), list(flat.stride()[own:])


def compact_tokens(tensors: list[Tensor], indices: Tensor, per_head: bool) -> None:
    """tensors [B, L, (H,) ...], indices [B, (H,) n] -> row j becomes row indices[j], in place."""
    batch, num_rows = indices.shape[0], indices.shape[-1]
    num_heads = indices.shape[1] if per_head else 1
    for tensor in tensors:
        x, sizes, strides = as_integers(tensor, 3 if per_head else 2)
        num_columns = math.prod(sizes)
        # Wide slices use memory best, but one sequence must keep the whole GPU busy too.
        for slice_bytes in (128, 64, 32):
            tile_columns = min(triton.next_power_of_2(num_columns), slice_bytes // x.itemsize)
            num_slices = triton.cdiv(num_columns, tile_columns)
            if batch * num_heads * num_slices >= MANY_PROGRAMS:
                break
        tile_rows = min(triton.next_power_of_2(num_rows), TILE_BYTES // (tile_columns * x.itemsize), 1024)
        with torch.cuda.device_of(x):
            compact_tokens_kernel[(batch * num_heads * num_slices,)](
                x,
                indices,
                x.shape[1],
                num_rows,
                num_columns,
                num_slices,
                num_heads,
                x.stride(0),
                x.stride(1),
                x.stride(2) if per_head else 0,
                indices.stride(0),
                indices.stride(1) if per_head else 0,
                indices.stride(-1),
                tuple(sizes),
                tuple(strides),
                DIMS=len(sizes),
                TILE_ROWS=tile_rows,
                TILE_COLUMNS=tile_columns,
                num_warps=max(1, min(8, tile_rows * tile_columns // 128)),
            )
