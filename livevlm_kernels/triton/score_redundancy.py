# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `score_redundancy`; arguments are documented in `livevlm_kernels/score_redundancy.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def length_of(x):
    """Euclidean lengths of the rows of `x` [N, D], and the same with 1 in place of 0, to divide by."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return norm, tl.where(norm == 0, 1.0, norm)


@triton.jit
def recent_patches_kernel(
    recent_k,
    patches,
    num_frames,
    tokens_per_frame,
    num_tiles,
    stride_batch,
    stride_frame,
    stride_slot,
    stride_head,
    stride_dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: the mean over the recent frames of the unit keys of TILE_SLOTS slots, one head.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    head = tl.program_id(1).to(tl.int64)
    slot = (program % num_tiles) * TILE_SLOTS + tl.arange(0, TILE_SLOTS)
    dim = tl.arange(0, TILE_DIM)[None, :].to(tl.int64)
    inside = (slot < tokens_per_frame)[:, None] & (dim < DIM)
    source = recent_k + batch * stride_batch + head * stride_head + slot[:, None] * stride_slot + dim * stride_dim
    total = tl.zeros([TILE_SLOTS, TILE_DIM], tl.float32)
    for _ in range(0, num_frames):
        key = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        _, divisor = length_of(key)
        total += key / divisor[:, None]
        source += stride_frame
    row = (batch * tokens_per_frame + slot[:, None]) * HEADS + head
    tl.store(patches + row * DIM + dim, total / num_frames, mask=inside)


@triton.jit
def score_redundancy_kernel(
    k,
    v,
    patches,
    slots,
    seq_lens,
    similarity,
    value_norm,
    seq_len,
    tokens_per_frame,
    num_tiles,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    slots_stride_batch,
    slots_stride_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
):
    # One program: TILE_TOKENS tokens of one head, or of all heads one after another if they are averaged.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_tiles
    token = (program % num_tiles) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    dim = tl.arange(0, TILE_DIM)[None, :].to(tl.int64)
    valid = token < seq_len
    if HAS_SEQ_LENS:
        valid = valid & (token < tl.load(seq_lens + batch))
    slot = tl.load(slots + batch * slots_stride_batch + token * slots_stride_token, mask=valid, other=-1)
    has_slot = valid & (slot >= 0) & (slot < tokens_per_frame)
    inside = valid[:, None] & (dim < DIM)
    compared = has_slot[:, None] & (dim < DIM)
    key_of = k + batch * k_stride_batch + token[:, None] * k_stride_token + dim * k_stride_dim
    value_of = v + batch * v_stride_batch + token[:, None] * v_stride_token + dim * v_stride_dim
    patch_of = patches + (batch * tokens_per_frame + slot.to(tl.int64)[:, None]) * (HEADS * DIM) + dim

    first = tl.program_id(1).to(tl.int64)  # 0 if heads are averaged
    cosine_sum = tl.zeros([TILE_TOKENS], tl.float32)
    norm_sum = tl.zeros([TILE_TOKENS], tl.float32)
    for i in tl.static_range(1 if PER_HEAD else HEADS):
        head = first + i
        key = tl.load(key_of + head * k_stride_head, mask=compared, other=0.0).to(tl.float32)
        value = tl.load(value_of + head * v_stride_head, mask=inside, other=0.0).to(tl.float32)
        patch = tl.load(patch_of + head * DIM, mask=compared, other=0.0)
        _, divisor = length_of(key)
        norm, _ = length_of(value)
        cosine_sum += tl.sum(key * patch, 1) / divisor
        norm_sum += norm
    row = batch
    if PER_HEAD:
        row = batch * HEADS + first
    else:
        cosine_sum /= HEADS
        norm_sum /= HEADS
    target = row * seq_len + token  # zero where there is no slot and beyond the end: nothing was loaded there
    tl.store(similarity + target, cosine_sum, mask=token < seq_len)
    tl.store(value_norm + target, norm_sum, mask=token < seq_len)


def tile_of(count: int, head_dim: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of keys, and warps: 2048 elements, two loads of 16 bytes a thread in 16 bit."""
    tile_dim = triton.next_power_of_2(head_dim)
    return max(1, min(triton.next_power_of_2(count), 2048 // tile_dim)), tile_dim, 4


def recent_patches(recent_k: Tensor) -> Tensor:
    """recent_k [B, F, T, H, D] -> the mean over F of unit keys, float32 [B, T, H, D]."""
    batch, num_frames, tokens_per_frame, num_kv_heads, head_dim = recent_k.shape
    shape = (batch, tokens_per_frame, num_kv_heads, head_dim)
    patches = torch.empty(shape, dtype=torch.float32, device=recent_k.device)
    tile_slots, tile_dim, num_warps = tile_of(min(tokens_per_frame, 16), head_dim)
    num_tiles = triton.cdiv(tokens_per_frame, tile_slots)
    recent_patches_kernel[(batch * num_tiles, num_kv_heads)](
        recent_k,
        patches,
        num_frames,
        tokens_per_frame,
        num_tiles,
        *recent_k.stride(),
        HEADS=num_kv_heads,
        DIM=head_dim,
        TILE_SLOTS=tile_slots,
        TILE_DIM=tile_dim,
        num_warps=num_warps,
    )
    return patches


def score_redundancy(
    k: Tensor, v: Tensor, recent_k: Tensor, slots: Tensor, seq_lens: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """k, v [B, L, H, D], recent_k [B, F, T, H, D], slots [B, L] -> similarity, value_norm [B, (H,) L]."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    shape = (batch, num_kv_heads, seq_len) if per_head else (batch, seq_len)
    similarity = torch.empty(shape, dtype=torch.float32, device=k.device)
    value_norm = torch.empty_like(similarity)
    tile_tokens, tile_dim, num_warps = tile_of(seq_len, head_dim)
    num_tiles = triton.cdiv(seq_len, tile_tokens)
    with torch.cuda.device_of(k):
        score_redundancy_kernel[(batch * num_tiles, num_kv_heads if per_head else 1)](
            k,
            v,
            recent_patches(recent_k),
            slots,
            seq_lens if seq_lens is not None else slots,
            similarity,
            value_norm,
            seq_len,
            recent_k.shape[2],
            num_tiles,
            *k.stride(),
            *v.stride(),
            *slots.stride(),
            HEADS=num_kv_heads,
            DIM=head_dim,
            TILE_TOKENS=tile_tokens,
            TILE_DIM=tile_dim,
            PER_HEAD=per_head,
            HAS_SEQ_LENS=seq_lens is not None,
            num_warps=num_warps,
        )
    return similarity, value_norm
