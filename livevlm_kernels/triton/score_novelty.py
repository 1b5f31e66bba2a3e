# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `score_novelty`; arguments are documented in `livevlm_kernels/score_novelty.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton.score_redundancy import tile_of


@triton.jit
def score_novelty_kernel(
    x,
    usual,
    slots,
    previous,
    seq_lens,
    change,
    step,
    seq_len,
    tokens_per_frame,
    num_tiles,
    x_stride_batch,
    x_stride_token,
    x_stride_head,
    x_stride_dim,
    usual_stride_batch,
    usual_stride_token,
    usual_stride_head,
    usual_stride_dim,
    slots_stride_batch,
    slots_stride_token,
    previous_stride_batch,
    previous_stride_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
):
    # One program: TILE_TOKENS tokens, head after head.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    token = (program % num_tiles) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    dim = tl.arange(0, TILE_DIM)[None, :].to(tl.int64)
    length = seq_len
    if HAS_SEQ_LENS:
        length = tl.minimum(length, tl.load(seq_lens + batch))
    valid = token < length
    slot = tl.load(slots + batch * slots_stride_batch + token * slots_stride_token, mask=valid, other=-1)
    before = tl.load(previous + batch * previous_stride_batch + token * previous_stride_token, mask=valid, other=-1)
    has_slot = (slot >= 0) & (slot < tokens_per_frame)
    has_before = (before >= 0) & (before < length)
    inside = valid[:, None] & (dim < DIM)
    of_row = x + batch * x_stride_batch + dim * x_stride_dim
    own_at = of_row + token[:, None] * x_stride_token
    before_at = of_row + before.to(tl.int64)[:, None] * x_stride_token
    usual_at = usual + batch * usual_stride_batch + dim * usual_stride_dim
    usual_at += slot.to(tl.int64)[:, None] * usual_stride_token

    change_sum = tl.zeros([TILE_TOKENS], tl.float32)
    step_sum = tl.zeros([TILE_TOKENS], tl.float32)
    for head in tl.static_range(HEADS):
        own = tl.load(own_at + head * x_stride_head, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(usual_at + head * usual_stride_head, mask=inside & has_slot[:, None], other=0.0)
        last = tl.load(before_at + head * x_stride_head, mask=inside & has_before[:, None], other=0.0).to(tl.float32)
        change_sum += tl.sum((own - mean) * (own - mean), 1)
        step_sum += tl.sum((own - last) * (own - last), 1)
    none = float("inf")
    target = batch * seq_len + token
    written = token < seq_len
    tl.store(change + target, tl.where(valid, tl.where(has_slot, tl.sqrt_rn(change_sum), none), 0.0), mask=written)
    tl.store(step + target, tl.where(valid, tl.where(has_before, tl.sqrt_rn(step_sum), none), 0.0), mask=written)


def score_novelty(
    x: Tensor, usual: Tensor, slots: Tensor, previous: Tensor, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, L, H, D], usual [B, T, H, D], slots and previous [B, L] -> change, step [B, L]."""
    batch, seq_len, num_kv_heads, head_dim = x.shape
    change = torch.empty((batch, seq_len), dtype=torch.float32, device=x.device)
    step = torch.empty_like(change)
    tile_tokens, tile_dim, num_warps = tile_of(seq_len, head_dim)
    num_tiles = triton.cdiv(seq_len, tile_tokens)
    with torch.cuda.device_of(x):
        score_novelty_kernel[(batch * num_tiles,)](
            x,
            usual,
            slots,
            previous,
            seq_lens if seq_lens is not None else slots,
            change,
            step,
            seq_len,
            usual.shape[1],
            num_tiles,
            *x.stride(),
            *usual.stride(),
            *slots.stride(),
            *previous.stride(),
            HEADS=num_kv_heads,
            DIM=head_dim,
            TILE_TOKENS=tile_tokens,
            TILE_DIM=tile_dim,
            HAS_SEQ_LENS=seq_lens is not None,
            num_warps=num_warps,
        )
    return change, step
