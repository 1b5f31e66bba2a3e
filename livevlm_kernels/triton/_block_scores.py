# SPDX-License-Identifier: Apache-2.0
"""Scores of `retrieve_blocks` by the mean query of a question."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def mean_queries_kernel(
    q,
    means,
    num_queries,
    stride_batch,
    stride_query,
    stride_head,
    stride_dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: the mean over the queries of one query head.
    program = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, TILE_DIM)[None, :]
    source = q + program // HEADS * stride_batch + program % HEADS * stride_head + dim.to(tl.int64) * stride_dim
    total = tl.zeros([TILE_DIM], tl.float32)
    for first in range(0, num_queries, TILE_QUERIES):
        query = first + tl.arange(0, TILE_QUERIES)[:, None]
        mask = (query < num_queries) & (dim < DIM)
        total += tl.sum(tl.load(source + query.to(tl.int64) * stride_query, mask=mask, other=0.0).to(tl.float32), 0)
    dim = tl.arange(0, TILE_DIM)
    tl.store(means + program * DIM + dim, total / num_queries, mask=dim < DIM)


@triton.jit
def block_scores_kernel(
    means,
    keys,
    seq_lens,
    scores,
    num_blocks,
    num_tiles,
    stride_batch,
    stride_block,
    stride_bound,
    stride_head,
    stride_dim,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    MINMAX: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: TILE_BLOCKS blocks of one KV head. Query heads are summed one by one: of infinite summaries, their
    # sum may be NaN where the product with the sum of the queries is not.
    program = tl.program_id(0).to(tl.int64)
    lane = program // num_tiles
    batch = lane // HEADS
    head = lane % HEADS
    block = (program % num_tiles).to(tl.int32) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    there = block < num_blocks
    if HAS_SEQ_LENS:
        there = there & (block < tl.load(seq_lens + batch))
    dim = tl.arange(0, TILE_DIM)
    mask = there[:, None] & (dim < DIM)[None, :]
    source = keys + batch * stride_batch + head * stride_head
    source += (block.to(tl.int64) * stride_block)[:, None] + (dim.to(tl.int64) * stride_dim)[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # the mean key, if not MINMAX
    high = low
    if MINMAX:
        high = tl.load(source + stride_bound, mask=mask, other=0.0).to(tl.float32)
    score = tl.zeros([TILE_BLOCKS], tl.float32)
    for member in range(0, GROUP):
        query = tl.load(means + (lane * GROUP + member) * DIM + dim, mask=dim < DIM, other=0.0)[None, :]
        if MINMAX:
            positive = tl.maximum(query, 0.0, propagate_nan=tl.PropagateNan.ALL)
            negative = tl.minimum(query, 0.0, propagate_nan=tl.PropagateNan.ALL)
            score += tl.sum(positive * high, 1) + tl.sum(negative * low, 1)
        else:
            score += tl.sum(query * low, 1)
    tl.store(scores + lane * num_blocks + block, score, mask=block < num_blocks)


def block_tile(head_dim: int) -> tuple[int, int]:
    """Blocks and dimensions of a tile: 32 elements a thread."""
    tile_dim = triton.next_power_of_2(head_dim)
    return min(max(1, 4096 // tile_dim), 128), tile_dim


def block_scores(q: Tensor, keys: Tensor, seq_lens: Tensor | None, minmax: bool) -> Tensor:
    """q [B, R, Hq, D], summaries [B, N, (2,) H, D] -> [B, H, N]: of the mean query, summed over a group's heads."""
    batch, num_queries, num_qo_heads, head_dim = q.shape
    num_blocks, num_kv_heads = keys.shape[1], keys.shape[-2]
    floats: dict[str, Any] = {"dtype": torch.float32, "device": keys.device}
    means = torch.empty((batch, num_qo_heads, head_dim), **floats)
    scores = torch.empty((batch, num_kv_heads, num_blocks), **floats)
    tile_blocks, tile_dim = block_tile(head_dim)
    num_tiles = triton.cdiv(num_blocks, tile_blocks)
    mean_queries_kernel[(batch * num_qo_heads,)](
        q,
        means,
        num_queries,
        *q.stride(),
        HEADS=num_qo_heads,
        DIM=head_dim,
        TILE_QUERIES=16,
        TILE_DIM=tile_dim,
    )
    block_scores_kernel[(batch * num_kv_heads * num_tiles,)](
        means,
        keys,
        seq_lens if seq_lens is not None else keys,
        scores,
        num_blocks,
        num_tiles,
        *keys.stride()[:2],
        keys.stride(2) if minmax else 0,
        *keys.stride()[-2:],
        HEADS=num_kv_heads,
        GROUP=num_qo_heads // num_kv_heads,
        DIM=head_dim,
        MINMAX=minmax,
        HAS_SEQ_LENS=seq_lens is not None,
        TILE_BLOCKS=tile_blocks,
        TILE_DIM=tile_dim,
    )
    return scores
