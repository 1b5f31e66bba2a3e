# SPDX-License-Identifier: Apache-2.0
"""What attention over blocks, and their retrieval, are compared with: the ways plain torch offers.

Keys are already rotated for all of these: none rotates as it reads. `gather_sdpa` is what one writes today; it copies
the selected blocks first. Others read the pool as one dense sequence, which is right where a sequence's blocks lie next
to one another, in any order but for the queries' own tokens at the end. They show what is left without a table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import baselines

FLEX_BLOCK = 128  # tokens: FlexAttention skips no smaller blocks


# ---------------------------------------------------------------- attention
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """q `[B * n, Hq, D]`, k and v `[B, L, H, D]` -> `[B * n, Hq, D]`, causal: the queries are the last tokens.

    Without a mask in memory torch takes its FlashAttention-2, with heads in groups.
    """
    query = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and query.shape[2] > 1:
        mask = causal_lower_right(query.shape[2], key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def gather(pool: Tensor, block_table: Tensor) -> Tensor:
    """The keys or values that a table `[B, M]` names, as new memory `[B, M * block_size, H, D]`."""
    return pool[block_table.long()].flatten(1, 2)


def gather_sdpa(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor) -> Tensor:
    return sdpa(q, gather(k, block_table), gather(v, block_table))


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    return sdpa(q, *(pool.view(batch, -1, *pool.shape[2:]) for pool in (k, v)))


def causal_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: str) -> Tensor:
    """To be added to logits: torch's cuDNN path aligns its own causal mask to the first key instead of the last."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, repeat: bool) -> Tensor:
    """One sequence, dense, through cuDNN; with `repeat` keys and values are repeated for all heads, as part of it."""
    key, value = (pool.view(1, -1, *pool.shape[2:]) for pool in (k, v))
    if repeat:
        key, value = (x.repeat_interleave(q.shape[1] // x.shape[2], 2) for x in (key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, key, value, mask)


def flex_mask(num_queries: int, num_keys: int, device: str) -> BlockMask:
    """Every key but those after the query's own, as lists of blocks: nothing is evaluated key by key to make it."""
    blocks = num_keys // FLEX_BLOCK
    if num_keys % FLEX_BLOCK or num_queries > FLEX_BLOCK:
        raise ValueError(f"{num_queries} queries, {num_keys} keys: not blocks of {FLEX_BLOCK}")
    partly = int(num_queries > 1)  # the last block: a single query sees all of it
    order = torch.arange(blocks, dtype=torch.int32, device=device).view(1, 1, 1, -1)

    def count(number: int) -> Tensor:
        return torch.full((1, 1, 1), number, dtype=torch.int32, device=device)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + (num_keys - num_queries)

    return BlockMask.from_kv_blocks(
        count(partly),
        order.flip(-1).contiguous(),
        count(blocks - partly),
        order,
        BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
        mask_mod=seen if partly else None,
        seq_lengths=(num_queries, num_keys),
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, attention: Any = flex_attention) -> Tensor:
    """One sequence through FlexAttention; its own blocks of 128 tokens stand for ours of 16 or 64."""
    query, key, value = (x.reshape(1, -1, *x.shape[-2:]).transpose(1, 2) for x in (q, k, v))
    out = attention(query, key, value, block_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)[0]


# ---------------------------------------------------------------- retrieval
def retrieve(
    q: Tensor, keys: Tensor, num_selected: int, kind: str, pooling: str, per_head: bool, block_size: int
) -> Tensor:
    """q `[B, n, Hq, D]`, summaries `[B, N, (2,) H, D]` or keys -> sorted blocks, int32 `[B, (H,) num_selected]`.

    Scores with the fewest products there are; then `topk` and `sort`.
    """
    heads = keys.shape[-2]
    if kind == "mass":
        mass = baselines.score_tokens(q, keys)
        scores = mass.unflatten(-1, (-1, block_size)).sum(-1)[:, None]
    else:
        queries = q.float() if pooling == "softmax" else q.float().mean(1, keepdim=True)
        grouped = queries.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H, G * n, D]
        if kind == "mean" and pooling == "query":
            grouped = grouped.sum(2, keepdim=True)  # a sum of dot products is the product with a sum
            if not per_head:
                grouped, keys = grouped.transpose(1, 2).flatten(2)[:, None], keys.flatten(2)[:, :, None]
        if kind == "mean":
            logits = grouped @ keys.permute(0, 2, 3, 1)
        else:
            low, high = keys.permute(0, 3, 4, 1, 2).unbind(-1)
            logits = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
        if pooling == "softmax":
            logits = (logits * q.shape[-1] ** -0.5).softmax(-1)
        scores = logits.sum(2)
    if not per_head:
        scores = scores.sum(1)
    return scores.topk(num_selected, sorted=False).indices.sort(-1).values.int()


def retrieve_and_attend(q: Tensor, summaries: Tensor, k: Tensor, v: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Mean query, top-k, gather, SDPA without a mask, for one stream: the output and the table."""
    table = retrieve(q[None], summaries[None], num_selected, "mean", "query", False, 1)
    query = q.transpose(0, 1)[None]
    key, value = (gather(pool, table).transpose(1, 2) for pool in (k, v))
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return out[0].transpose(0, 1), table[0]


# ---------------------------------------------------------------- merging
def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """No part is empty."""
    lse = lses.logsumexp(0)
    return ((lses - lse).exp()[..., None] * outs).sum(0).to(outs.dtype), lse
