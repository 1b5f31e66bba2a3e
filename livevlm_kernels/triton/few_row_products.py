# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a question's rows, each by one kernel with what surrounds it.

Queries, keys and values come of one kernel that reads the three weights as if they were one: three products of few rows
leave a GPU waiting three times, and two of them are too small to keep it busy. Gate and up projection are read
alternately, so that what a program needs of both to apply the activation is its own. Weights are the left operand, as
tensor cores take 64 of their rows at a time. Sums run in float32, in an order that follows from the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from livevlm_kernels.triton._attend import dot
from livevlm_kernels.triton._interpreter import INTERPRETED
from livevlm_kernels.triton.layer_steps import rounded
from livevlm_kernels.triton.row_products import part_of

HEIGHT, DEPTH = 64, 128  # rows of weights for each program, and their elements at a time
PROJECT_STAGES, GATED_STAGES = 6, 3  # few programs, which need much under way each; and many
WARPS = 4


@triton.jit
def times_rows(
    weights,
    is_column,
    x,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """float32 `[HEIGHT, ROWS]`: the product of rows of weights, which begin where `weights` points, with those of x."""
    row = tl.arange(0, ROWS)
    rows, is_row = x + row.to(tl.int64) * WIDTH, row < num_rows
    sums = tl.zeros([HEIGHT, ROWS], tl.float32)
    for first in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
        depth = first + tl.arange(0, DEPTH)
        there = depth < WIDTH
        left = tl.load(weights[:, None] + depth[None, :], mask=is_column[:, None] & there[None, :], other=0.0)
        right = tl.load(rows[None, :] + depth[:, None], mask=is_row[None, :] & there[:, None], other=0.0)
        sums = dot(left, right, sums, WIDEN)
    return sums


@triton.jit
def project_rows_kernel(
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
    last_q,
    num_rows,
    q_height,
    kv_height,
    num_q,
    num_kv,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_LAST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # One program: rows of one of the three weights, times all rows of x.
    program = tl.program_id(0)
    number, weight, bias, out, height = part_of(
        program, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, q, k_slots, v_slots, place,
        q_height, kv_height, num_q, num_kv,
    )  # fmt: skip
    row, column = tl.arange(0, ROWS), number * HEIGHT + tl.arange(0, HEIGHT)
    is_row, is_column = (row < num_rows)[:, None], column < height
    weights = weight + column.to(tl.int64) * WIDTH
    sums = times_rows(weights, is_column, x, num_rows, WIDTH, ROWS, HEIGHT, DEPTH, STAGES, WIDEN)
    sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
    result = sums.to(q.dtype.element_ty).trans()
    if HAS_LAST:
        if program < num_q:
            num_tokens = tl.load(place + 3)
            into = last_q + column[None, :] + tl.zeros([ROWS, 1], tl.int32)
            tl.store(into, result, mask=(row == num_tokens - 1)[:, None] & is_column[None, :])
            result = tl.where((row < num_tokens)[:, None], result, 0.0).to(q.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * height + column[None, :], result, mask=is_row & is_column[None, :])


@triton.jit
def gated_rows_kernel(
    x,
    gate,
    distance,
    out,
    num_rows,
    height,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # One program: as many rows of the gate's weight as of up's, which lies `distance` elements behind it.
    half: tl.constexpr = HEIGHT // 2
    row, both = tl.arange(0, ROWS), tl.arange(0, HEIGHT)
    first = tl.program_id(0) * half
    column = first + both % half
    weights = gate + (tl.where(both < half, 0, distance) + column.to(tl.int64) * WIDTH)
    sums = times_rows(weights, column < height, x, num_rows, WIDTH, ROWS, HEIGHT, DEPTH, STAGES, WIDEN)
    left, right = sums.reshape(2, half, ROWS).permute(1, 2, 0).split()
    left, right = rounded(left, out), rounded(right, out)
    result = (rounded(left / (1.0 + tl.exp(-left)), out) * right).to(out.dtype.element_ty).trans()
    column = first + tl.arange(0, half)
    there = (row < num_rows)[:, None] & (column < height)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * height + column[None, :], result, mask=there)


def project(
    x: Tensor,
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    k_slots: Tensor,
    v_slots: Tensor,
    place: Tensor,
    last_q: Tensor | None,
) -> Tensor:
    """x [R, K], weights and biases -> queries [R, Hq * D]; keys and values go to slots from place[0] on."""
    q_height, kv_height = q[0].shape[0], k[0].shape[0]
    out = torch.empty((x.shape[0], q_height), dtype=x.dtype, device=x.device)
    num_q, num_kv = triton.cdiv(q_height, HEIGHT), triton.cdiv(kv_height, HEIGHT)
    with torch.cuda.device_of(x):
        project_rows_kernel[(num_q + 2 * num_kv,)](
            x, *q, *k, *v, out, k_slots, v_slots, place, out if last_q is None else last_q,
            x.shape[0], q_height, kv_height, num_q, num_kv, HAS_LAST=last_q is not None, **_plan(x, PROJECT_STAGES),
        )  # fmt: skip
    return out


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """x [R, K], weights [N, K] -> silu(x gate) * (x up) [R, N]."""
    height, distance = gate.shape[0], (up.data_ptr() - gate.data_ptr()) // gate.element_size()
    out = torch.empty((x.shape[0], height), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        gated_rows_kernel[(triton.cdiv(height, HEIGHT // 2),)](
            x, gate, distance, out, x.shape[0], height, **_plan(x, GATED_STAGES)
        )
    return out


def _plan(x: Tensor, most_stages: int) -> dict[str, int | bool]:
    """Sizes of a program; as many stages as shared memory has room for."""
    rows = max(16, triton.next_power_of_2(x.shape[0]))
    stages = 1
    if x.is_cuda:
        room = driver.active.utils.get_device_properties(x.device.index)["max_shared_mem"]
        stages = max(1, min(most_stages, (room - 2048) // ((HEIGHT + rows) * DEPTH * x.element_size())))
    widen = INTERPRETED or x.dtype == torch.float32
    sizes = {"WIDTH": x.shape[1], "ROWS": rows, "HEIGHT": HEIGHT, "DEPTH": DEPTH, "STAGES": stages}
    return {**sizes, "WIDEN": widen, "num_warps": WARPS}
