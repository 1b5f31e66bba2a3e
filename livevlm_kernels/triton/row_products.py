# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a single row: reading a layer's weights once is all that decoding has to wait for.

Each program has a few rows of a weight, and asks for as much of them as its registers hold before it needs any. Sums
run in float32 in an order that follows from the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton.layer_steps import rounded


def plan_of(width: int) -> tuple[int, int, int]:
    """Rows of a weight for each program, how many elements of a row it asks for together, and its warps."""
    return 4 if width <= 8192 else 2, min(4096, triton.next_power_of_2(width)), 8


@triton.jit
def dot_rows(x, weight, row, height, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """float32 `[ROWS]`: the product of x `[WIDTH]` with these rows of weight `[height, WIDTH]`."""
    source = weight + row.to(tl.int64)[:, None] * WIDTH
    inside = (row < height)[:, None]
    sums = tl.zeros([ROWS, TILE], tl.float32)
    for first in tl.static_range(0, WIDTH, TILE):
        column = first + tl.arange(0, TILE)
        there = column < WIDTH
        value = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
        weights = tl.load(source + column[None, :], mask=inside & there[None, :], other=0.0)
        sums += weights.to(tl.float32) * value[None, :]
    return tl.sum(sums, 1)


@triton.jit
def product_kernel(x, weight, out, height, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    result = dot_rows(x, weight, row, height, WIDTH, ROWS, TILE)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < height)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, K], weight [N, K] -> [1, N]."""
    height, width = weight.shape
    out = torch.empty((1, height), dtype=x.dtype, device=x.device)
    rows, tile, num_warps = plan_of(width)
    with torch.cuda.device_of(x):
        product_kernel[(triton.cdiv(height, rows),)](
            x, weight, out, height, WIDTH=width, ROWS=rows, TILE=tile, num_warps=num_warps
        )
    return out


@triton.jit
def gated_kernel(x, gate, up, out, height, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    left = rounded(dot_rows(x, gate, row, height, WIDTH, ROWS, TILE), out)
    right = rounded(dot_rows(x, up, row, height, WIDTH, ROWS, TILE), out)
    result = rounded(left / (1.0 + tl.exp(-left)), out) * right
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < height)


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """x [1, K], weights [N, K] -> silu(x gate) * (x up) [1, N]."""
    height, width = gate.shape
    out = torch.empty((1, height), dtype=x.dtype, device=x.device)
    rows, tile, num_warps = plan_of(width)
    rows //= 2  # of each of the two
    with torch.cuda.device_of(x):
        gated_kernel[(triton.cdiv(height, rows),)](
            x, gate, up, out, height, WIDTH=width, ROWS=rows, TILE=tile, num_warps=num_warps
        )
    return out


@triton.jit
def part_of(
    program,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    q,
    k_slots,
    v_slots,
    place,
    q_height,
    kv_height,
    num_q,
    num_kv,
):
    """Of queries, keys or values, one that the program works on, and which of their programs it is; keys and values
    go to slots from place[0] on."""
    number = program
    weight, bias, out, height = q_weight, q_bias, q, q_height
    if program >= num_q:
        slot = tl.load(place).to(tl.int64) * kv_height
        number = program - num_q
        weight, bias, out, height = k_weight, k_bias, k_slots + slot, kv_height
        if program >= num_q + num_kv:
            number = program - num_q - num_kv
            weight, bias, out = v_weight, v_bias, v_slots + slot
    return number, weight, bias, out, height


@triton.jit
def project_kernel(
    x,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    q,
    k_slots,
    v_slots,
    place,
    q_height,
    kv_height,
    num_q,
    num_kv,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: rows of one of the three.
    number, weight, bias, out, height = part_of(
        tl.program_id(0), q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, q, k_slots, v_slots, place,
        q_height, kv_height, num_q, num_kv,
    )  # fmt: skip
    row = number * ROWS + tl.arange(0, ROWS)
    result = dot_rows(x, weight, row, height, WIDTH, ROWS, TILE)
    result += tl.load(bias + row, mask=row < height, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(q.dtype.element_ty), mask=row < height)


def project(
    x: Tensor,
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    k_slots: Tensor,
    v_slots: Tensor,
    place: Tensor,
) -> Tensor:
    """x [1, K], weights and biases -> queries [1, Hq * D]; keys and values go to slot place[0]."""
    q_height, width = q[0].shape
    kv_height = k[0].shape[0]
    out = torch.empty((1, q_height), dtype=x.dtype, device=x.device)
    rows, tile, num_warps = plan_of(width)
    num_q, num_kv = triton.cdiv(q_height, rows), triton.cdiv(kv_height, rows)
    with torch.cuda.device_of(x):
        project_kernel[(num_q + 2 * num_kv,)](
            x, *q, *k, *v, out, k_slots, v_slots, place, q_height, kv_height, num_q, num_kv,
            WIDTH=width, ROWS=rows, TILE=tile, num_warps=num_warps,
        )  # fmt: skip
    return out
