# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `score_tokens`; arguments are documented in `livevlm_kernels/score_tokens.py`.

Two passes over the keys, because the share of a key is known only once its row's sum is. The first finds maximum and
sum of each row, split by split; the second sums the shares of each key over the rows. The queries and heads that share
a KV head are the rows of one matrix: row r is query r // GROUP, head r % GROUP.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from livevlm_kernels.triton._interpreter import INTERPRETED
from livevlm_kernels.triton._keys import cache_rows, logits_of
from livevlm_kernels.triton._row_sums import combine_kernel, row_sums_kernel, rows_of_queries

KEYS_PER_SPLIT = 1024  # a constant: a row's sum must not depend on the rest of the batch


@triton.jit
def key_sums_kernel(
    q,
    k,
    seq_lens,
    positions,
    cos_sin_cache,
    top,
    share,
    scores,
    num_rows,
    seq_len,
    num_queries,
    max_position,
    scale_log2,
    num_key_tiles,
    q_stride_batch,
    q_stride_query,
    q_stride_head,
    q_stride_dim,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    positions_stride_batch,
    positions_stride_token,
    cache_stride_row,
    cache_stride_dim,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # One program: TILE_KEYS keys of one KV head, all rows.
    program = tl.program_id(0).to(tl.int64)
    batch = program // num_key_tiles // HEADS
    head = program // num_key_tiles % HEADS
    token = (program % num_key_tiles).to(tl.int32) * TILE_KEYS + tl.arange(0, TILE_KEYS)
    inside = token < seq_len
    if HAS_SEQ_LENS:
        inside = inside & (token < tl.load(seq_lens + batch))
    token_offset = token.to(tl.int64) * k_stride_token
    key_of = k + batch * k_stride_batch + head * k_stride_head
    cache_offset = token_offset
    if ROPE:
        position_of = positions + batch * positions_stride_batch
        cache_offset = cache_rows(position_of, token, inside, positions_stride_token, max_position, cache_stride_row)

    score = tl.zeros([TILE_KEYS], tl.float32)
    for first_row in range(0, num_rows, TILE_ROWS):
        offset, end, _ = rows_of_queries(
            q, seq_lens, batch, head, first_row, num_rows, seq_len, num_queries,
            q_stride_batch, q_stride_query, q_stride_head, GROUP, HAS_SEQ_LENS, CAUSAL, TILE_ROWS,
        )  # fmt: skip
        row = first_row + tl.arange(0, TILE_ROWS)
        logits = logits_of(
            q, offset, row < num_rows, q_stride_dim, key_of, token_offset, inside, k_stride_dim,
            cos_sin_cache, cache_offset, cache_stride_dim, DIM, TILE_DIM, ROPE, WIDEN,
        )  # fmt: skip
        source = (batch * HEADS + head) * num_rows + row
        highest = tl.load(top + source, mask=row < num_rows, other=0.0)
        weight = tl.load(share + source, mask=row < num_rows, other=0.0)
        shares = tl.exp2((logits - highest[:, None]) * scale_log2) * weight[:, None]
        score += tl.sum(tl.where(token[None, :] < end[:, None], shares, 0.0), 0)
    tl.store(scores + (batch * HEADS + head) * seq_len + token, score, mask=token < seq_len)


@triton.jit
def mean_kernel(scores, means, seq_len, num_tiles, HEADS: tl.constexpr, NUM_SHARED: tl.constexpr, TILE: tl.constexpr):
    # One program: TILE tokens of one row of the result, the mean over layers of the mean over heads.
    program = tl.program_id(0).to(tl.int64)
    row = program // num_tiles
    token = (program % num_tiles) * TILE + tl.arange(0, TILE)
    source = scores + row * (NUM_SHARED * HEADS) * seq_len + token
    mean = tl.zeros([TILE], tl.float32)
    for _ in range(0, NUM_SHARED):
        layer = tl.zeros([TILE], tl.float32)
        for _ in tl.static_range(HEADS):
            layer += tl.load(source, mask=token < seq_len, other=0.0)
            source += seq_len
        mean += layer / HEADS
    tl.store(means + row * seq_len + token, mean / NUM_SHARED, mask=token < seq_len)


def tiles_of(num_rows: int, head_dim: int, rope: bool, dtype: torch.dtype) -> tuple[dict[str, int], int, int, int]:
    """Sizes of the tiles of both passes as kernel constants, warps, and pipeline stages of the first and the second."""
    full = dtype == torch.float32 and not INTERPRETED  # without tensor cores: operands must fit into registers
    most = 64 if full or head_dim > 128 else 128
    rows = min(max(triton.next_power_of_2(num_rows), 16), most)
    half = head_dim // 2 if rope else head_dim
    constants = {
        "TILE_ROWS": rows,
        "TILE_KEYS": 128 if INTERPRETED else 64,
        "TILE_DIM": min(max(triton.next_power_of_2(half), 16), (16 if rope else 32) if full else 256),
        "WIDEN": full or INTERPRETED,
    }
    # Two stages in the second pass: its tiles of queries are large, and two programs should fit a multiprocessor.
    return constants, 8 if rows == 128 else 4, 1 if full else 3, 1 if full else 2


def score_tokens(
    q: Tensor,
    k: Tensor,
    seq_lens: Tensor | None,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    sm_scale: float,
    causal: bool,
    per_head: bool,
    num_shared: int,
) -> Tensor:
    """q [B, R, Hq, D], k [B, L, H, D] -> [B, H, L] if `per_head`, else [B / num_shared, L]."""
    batch, num_queries, num_qo_heads, head_dim = q.shape
    _, seq_len, num_kv_heads, _ = k.shape
    group = num_qo_heads // num_kv_heads
    num_rows = num_queries * group
    num_splits = triton.cdiv(seq_len, KEYS_PER_SPLIT)
    rope = positions is not None and cos_sin_cache is not None
    scale_log2 = sm_scale * math.log2(math.e)
    constants, num_warps, row_stages, key_stages = tiles_of(num_rows, head_dim, rope, k.dtype)
    constants |= {"HEADS": num_kv_heads, "GROUP": group, "DIM": head_dim, "ROPE": rope}
    constants |= {"HAS_SEQ_LENS": seq_lens is not None, "CAUSAL": causal}
    inputs = (q, k, *(x if x is not None else k for x in (seq_lens, positions, cos_sin_cache)))
    sizes = (num_rows, seq_len, num_queries, cos_sin_cache.shape[0] if cos_sin_cache is not None else 1, scale_log2)
    steps = (
        *q.stride(),
        *k.stride(),
        *(positions.stride() if positions is not None else (0, 0)),
        *(cos_sin_cache.stride() if cos_sin_cache is not None else (0, 0)),
    )
    lanes = batch * num_kv_heads
    floats: dict[str, Any] = {"dtype": torch.float32, "device": k.device}
    tops, sums = torch.empty((2, lanes, num_splits, num_rows), **floats)
    top, share = torch.empty((2, lanes, num_rows), **floats)
    scores = torch.empty((batch, num_kv_heads, seq_len), **floats)
    row_tiles, key_tiles = triton.cdiv(num_rows, constants["TILE_ROWS"]), triton.cdiv(seq_len, constants["TILE_KEYS"])
    with torch.cuda.device_of(k):
        row_sums_kernel[(lanes * row_tiles, num_splits)](
            *inputs, tops, sums, *sizes, row_tiles, *steps,
            **constants, KEYS_PER_SPLIT=KEYS_PER_SPLIT, num_warps=num_warps, num_stages=row_stages,
        )  # fmt: skip
        combine_kernel[(lanes, triton.cdiv(num_rows, 128))](
            tops, sums, top, share, num_rows, num_splits, scale_log2, TILE=128
        )
        key_sums_kernel[(lanes * key_tiles,)](
            *inputs, top, share, scores, *sizes, key_tiles, *steps,
            **constants, num_warps=num_warps, num_stages=key_stages,
        )  # fmt: skip
        if per_head:
            return scores
        means = torch.empty((batch // num_shared, seq_len), **floats)
        tile = min(triton.next_power_of_2(seq_len), 512)
        num_tiles = triton.cdiv(seq_len, tile)
        mean_kernel[(means.shape[0] * num_tiles,)](
            scores, means, seq_len, num_tiles, HEADS=num_kv_heads, NUM_SHARED=num_shared, TILE=tile
        )
    return means
