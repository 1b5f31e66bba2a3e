# SPDX-License-Identifier: Apache-2.0
"""Triton kernels between the matrix products of a decoder layer; see `livevlm_kernels/layer_steps.py`.

Sums and products are rounded to the dtype of the tensors exactly where the eager code rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a program that has nothing to add up


@triton.jit
def rounded(x, like):
    """`x`, float32, as a tensor of the dtype that `like` points to holds it."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def add_rms_norm_kernel(x, delta, weight, total, out, hidden, eps, HAS_DELTA: tl.constexpr, TILE: tl.constexpr):
    # One program: a row.
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, TILE)
    mask = column < hidden
    value = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value = rounded(value + tl.load(delta + row + column, mask=mask, other=0.0).to(tl.float32), x)
        tl.store(total + row + column, value.to(total.dtype.element_ty), mask=mask)
    normal = value * tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    tl.store(out + row + column, (scale * rounded(normal, x)).to(out.dtype.element_ty), mask=mask)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [R, N] -> x + delta, normalised [R, N]."""
    rows, hidden = x.shape
    total, out = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    tile = triton.next_power_of_2(hidden)
    with torch.cuda.device_of(x):
        add_rms_norm_kernel[(rows,)](
            x, x if delta is None else delta, weight, total, out, hidden, eps,
            HAS_DELTA=delta is not None, TILE=tile, num_warps=max(1, min(16, tile // 256)),
        )  # fmt: skip
    return total, out


@triton.jit
def silu_mul_kernel(gate, up, out, numel, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < numel
    x = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (rounded(x / (1.0 + tl.exp(-x)), gate) * y).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """[R, N] -> [R, N]."""
    out = torch.empty_like(gate) if out is None else out
    with torch.cuda.device_of(gate):
        silu_mul_kernel[(triton.cdiv(gate.numel(), TILE),)](gate, up, out, gate.numel(), TILE=TILE)
    return out


@triton.jit
def store_tokens_kernel(
    q,
    k,
    v,
    k_slots,
    v_slots,
    place,
    last_q,
    q_width,
    kv_width,
    HAS_LAST: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: TILE elements of a row of keys and values, and of queries.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    slot = row + tl.load(place)
    mask = column < kv_width
    tl.store(k_slots + slot * kv_width + column, tl.load(k + row * kv_width + column, mask=mask), mask=mask)
    tl.store(v_slots + slot * kv_width + column, tl.load(v + row * kv_width + column, mask=mask), mask=mask)
    if HAS_LAST:
        num_tokens = tl.load(place + 3)
        mask = column < q_width
        if row == num_tokens - 1:
            tl.store(last_q + column, tl.load(q + row * q_width + column, mask=mask), mask=mask)
        if row >= num_tokens:
            tl.store(q + row * q_width + column, tl.zeros([TILE], q.dtype.element_ty), mask=mask)


def store_tokens(
    q: Tensor, k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, place: Tensor, last_q: Tensor | None
) -> None:
    """q [R, Hq * D], k and v [R, H * D] -> slots [S, H, D], last_q [Hq * D]."""
    rows, q_width = q.shape
    kv_width = k.shape[1]
    width = kv_width if last_q is None else max(q_width, kv_width)
    tile = min(TILE, triton.next_power_of_2(width))
    with torch.cuda.device_of(q):
        store_tokens_kernel[(rows, triton.cdiv(width, tile))](
            q, k, v, k_slots, v_slots, place, q if last_q is None else last_q, q_width, kv_width,
            HAS_LAST=last_q is not None, TILE=tile,
        )  # fmt: skip


@triton.jit
def describe_tokens_kernel(
    facts, position, frame, slot, time, size, num_tokens, tokens_per_frame, num_slots, TILE: tl.constexpr
):
    # One program: TILE tokens in one layer.
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = token < num_tokens
    at = tl.program_id(1).to(tl.int64) * num_slots + tl.load(facts).to(tl.int64) + token
    own = token // tokens_per_frame
    tl.store(position + at, tl.load(facts + 4).to(tl.int32) + token, mask=mask)
    tl.store(frame + at, tl.load(facts + 5).to(tl.int32) + own, mask=mask)
    tl.store(slot + at, token - own * tokens_per_frame, mask=mask)
    tl.store(time + at, tl.load(facts + 6 + own, mask=mask), mask=mask)
    tl.store(size + at, tl.full([TILE], 1.0, tl.float32), mask=mask)


def describe_tokens(facts: Tensor, tokens_per_frame: int, known: Sequence[Tensor]) -> None:
    """facts [6 + num_frames] -> each of known [L, S]."""
    num_layers, num_slots = known[0].shape
    num_tokens = (facts.shape[0] - 6) * tokens_per_frame
    with torch.cuda.device_of(facts):
        describe_tokens_kernel[(triton.cdiv(num_tokens, TILE), num_layers)](
            facts, *known, num_tokens, tokens_per_frame, num_slots, TILE=TILE
        )


@triton.jit
def fill_table_kernel(selected, choice, table, most, num_blocks, TILE: tl.constexpr):
    first = tl.load(choice)
    candidates = tl.load(choice + 1)
    count = tl.load(choice + 2)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    number = column - first
    retrieved = (number >= 0) & (number < count)
    found = tl.load(selected + number, mask=retrieved & (number < most), other=-1)
    later = column + candidates - count
    block = tl.where(retrieved, tl.where(found >= 0, found + first, -1), tl.where(later < num_blocks, later, -1))
    tl.store(table + column, tl.where(column < first, column, block), mask=column < num_blocks)


def fill_table(selected: Tensor, choice: Tensor, table: Tensor) -> None:
    """selected [most], choice [3] -> table [num_blocks]."""
    num_blocks = table.shape[0]
    with torch.cuda.device_of(table):
        fill_table_kernel[(triton.cdiv(num_blocks, TILE),)](
            selected, choice, table, selected.shape[0], num_blocks, TILE=TILE
        )
