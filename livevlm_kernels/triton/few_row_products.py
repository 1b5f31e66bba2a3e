# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a question's tokens by one kernel, which reads the three weights as if they were one.

Three products of few rows leave a GPU waiting three times, and two of them are too small to keep it busy. Sums run in
float32, in an order that follows from the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._attend import dot
from livevlm_kernels.triton._interpreter import INTERPRETED
from livevlm_kernels.triton.row_products import part_of

HEIGHT, DEPTH = 32, 128  # rows of a weight for each program, and their elements at a time
STAGES, WARPS = 4, 4


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
    is_row, is_column = (row < num_rows)[:, None], (column < height)[None, :]
    rows = x + row.to(tl.int64)[:, None] * WIDTH
    columns = weight + column.to(tl.int64)[None, :] * WIDTH
    sums = tl.zeros([ROWS, HEIGHT], tl.float32)
    for first in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
        depth = first + tl.arange(0, DEPTH)
        there = depth < WIDTH
        some = tl.load(rows + depth[None, :], mask=is_row & there[None, :], other=0.0)
        weights = tl.load(columns + depth[:, None], mask=is_column & there[:, None], other=0.0)
        sums = dot(some, weights, sums, WIDEN)
    sums += tl.load(bias + column, mask=column < height, other=0.0).to(tl.float32)[None, :]
    result = sums.to(q.dtype.element_ty)
    if HAS_LAST:
        if program < num_q:
            num_tokens = tl.load(place + 3)
            into = last_q + column[None, :] + tl.zeros([ROWS, 1], tl.int32)
            tl.store(into, result, mask=(row == num_tokens - 1)[:, None] & is_column)
            result = tl.where((row < num_tokens)[:, None], result, 0.0).to(q.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * height + column[None, :], result, mask=is_row & is_column)


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
    num_rows, width = x.shape
    q_height, kv_height = q[0].shape[0], k[0].shape[0]
    out = torch.empty((num_rows, q_height), dtype=x.dtype, device=x.device)
    num_q, num_kv = triton.cdiv(q_height, HEIGHT), triton.cdiv(kv_height, HEIGHT)
    with torch.cuda.device_of(x):
        project_rows_kernel[(num_q + 2 * num_kv,)](
            x, *q, *k, *v, out, k_slots, v_slots, place, out if last_q is None else last_q,
            num_rows, q_height, kv_height, num_q, num_kv, WIDTH=width, ROWS=max(16, triton.next_power_of_2(num_rows)),
            HEIGHT=HEIGHT, DEPTH=DEPTH, STAGES=STAGES, HAS_LAST=last_q is not None,
            WIDEN=INTERPRETED or x.dtype == torch.float32, num_warps=WARPS,
        )  # fmt: skip
    return out
