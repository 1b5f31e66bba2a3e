# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `evict_similar`; arguments are documented in `livevlm_kernels/evict_similar.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._order import RANK_OF_INFINITY, among_largest, rank_of, write_largest
from livevlm_kernels.triton._radix import nth_largest, tile_of
from livevlm_kernels.triton.compact_tokens import compact_tokens
from livevlm_kernels.triton.score_redundancy import score_redundancy


@triton.jit
def mean_norm_kernel(value_norm, means, seq_len, TILE: tl.constexpr):
    # One program: the mean value norm of one layer.
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, seq_len, TILE):
        token = first + tl.arange(0, TILE)
        total += tl.load(value_norm + row * seq_len + token, mask=token < seq_len, other=0.0)
    tl.store(means + row, tl.sum(total) / seq_len)


@triton.jit
def similarity_keys_kernel(
    similarity,
    value_norm,
    means,
    keys,
    shared_norm,
    seq_len,
    past,
    num_tiles,
    NUM_SHARED: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program: TILE tokens of one row. Averages the scores over NUM_SHARED layers, value norms relative to the
    # layer's mean because they grow with depth; the least similar tokens before `past` get the highest keys.
    program = tl.program_id(0).to(tl.int64)
    row = program // num_tiles
    token = (program % num_tiles) * TILE + tl.arange(0, TILE)
    inside = token < seq_len
    target = row * seq_len + token
    source = row * NUM_SHARED * seq_len + token
    if NUM_SHARED > 1:
        mean_similarity = tl.zeros([TILE], tl.float32)
        mean_norm = tl.zeros([TILE], tl.float32)
        for layer in range(0, NUM_SHARED):
            mean = tl.load(means + row * NUM_SHARED + layer)
            mean_similarity += tl.load(similarity + source, mask=inside, other=0.0)
            mean_norm += tl.load(value_norm + source, mask=inside, other=0.0) / tl.where(mean == 0, 1.0, mean)
            source += seq_len
        mean_similarity /= NUM_SHARED
        tl.store(shared_norm + target, mean_norm / NUM_SHARED, mask=inside)
    else:
        mean_similarity = tl.load(similarity + source, mask=inside, other=0.0)
    tl.store(keys + target, tl.where(token < past, rank_of(-mean_similarity), 0), mask=inside)


@triton.jit
def norm_keys_kernel(keys, value_norm, seq_len, past, num_dissimilar, SOME: tl.constexpr, TILE: tl.constexpr):
    # One program: one row. Its least similar tokens and its recent ones are kept; others compete by value norm.
    row = tl.program_id(0).to(tl.int64)
    keys += row * seq_len
    value = tl.full([], 0, tl.int64)
    num_equal = tl.full([], 0, tl.int32)
    if SOME:
        value, num_equal = nth_largest(keys, seq_len, num_dissimilar, 24, TILE)
    seen = tl.full([], 0, tl.int32)
    for first in range(0, seq_len, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < seq_len
        kept = token >= past
        if SOME:
            key = tl.load(keys + token, mask=inside, other=0)
            dissimilar, seen = among_largest(key, value, num_equal, seen)
            kept = kept | dissimilar
        norm = tl.load(value_norm + row * seq_len + token, mask=inside, other=0.0)
        tl.store(keys + token, tl.where(kept, RANK_OF_INFINITY, rank_of(norm)), mask=inside)


def evict_similar(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tensors: list[Tensor],
    budget: int,
    num_recent_frames: int,
    tokens_per_frame: int,
    num_dissimilar: int,
    per_head: bool,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    """k, v [B, L, H, D], tensors [B, L, (H,) ...] compacted in place -> indices [B, (H,) budget], counts [B, (H)]."""
    batch, seq_len, num_kv_heads, _ = k.shape
    past = seq_len - num_recent_frames * tokens_per_frame
    recent_k = k[:, past:].unflatten(1, (num_recent_frames, tokens_per_frame))
    similarity, value_norm = score_redundancy(k, v, recent_k, slots, None, per_head)
    rows = (batch * num_kv_heads if per_head else batch) // num_shared
    keys = torch.empty((rows, seq_len), dtype=torch.int64, device=k.device)
    means, shared_norm = value_norm, value_norm
    tile, num_warps = tile_of(seq_len)
    wide = min(tile, 1024)
    num_tiles = triton.cdiv(seq_len, wide)
    with torch.cuda.device_of(k):
        if num_shared > 1:
            means = torch.empty((batch,), dtype=torch.float32, device=k.device)
            shared_norm = torch.empty((rows, seq_len), dtype=torch.float32, device=k.device)
            mean_norm_kernel[(batch,)](value_norm, means, seq_len, TILE=tile, num_warps=num_warps)
        similarity_keys_kernel[(rows * num_tiles,)](
            similarity, value_norm, means, keys, shared_norm, seq_len, past, num_tiles, NUM_SHARED=num_shared, TILE=wide
        )
        norm_keys_kernel[(rows,)](
            keys,
            shared_norm,
            seq_len,
            past,
            max(num_dissimilar, 1),
            SOME=num_dissimilar > 0,
            TILE=tile,
            num_warps=num_warps,
        )
        indices, counts = write_largest(keys, budget, 24)
    if num_shared > 1:
        indices, counts = indices.repeat_interleave(num_shared, 0), counts.repeat_interleave(num_shared, 0)
    if per_head:
        indices, counts = indices.view(batch, num_kv_heads, budget), counts.view(batch, num_kv_heads)
    compact_tokens([k, v, *tensors], indices, per_head)
    return indices, counts
