# SPDX-License-Identifier: Apache-2.0
"""Definition of `select_tokens`; arguments are checked and documented in `livevlm_kernels/select_tokens.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def select_tokens(
    scores: Tensor,
    seq_lens: Tensor | None,
    buckets: Tensor | None,
    budget: int,
    num_top: int,
    num_buckets: int,
    bucket_capacity: int,
) -> tuple[Tensor, Tensor]:
    """scores [B, L] -> indices [B, budget], counts [B].

    The greedy walk has an exact parallel form. Within a bucket tokens are met in order of score, and the first
    `bucket_capacity` of them are always taken, by either phase; so the walk takes a token exactly if fewer than
    `bucket_capacity` tokens of its bucket come before it in the order of scores.
    """
    batch, seq_len = scores.shape
    token = torch.arange(seq_len, device=scores.device)
    length = token.new_full((batch, 1), seq_len) if seq_lens is None else seq_lens[:, None].clamp(0, seq_len)
    # + 0.0 turns -0.0 into 0.0, so that the two tie in radix sorts too.
    score = torch.where((token < length) & ~scores.isnan(), scores.float() + 0.0, -torch.inf)

    ordered, order = torch.sort(score, dim=-1, descending=True, stable=True)
    eligible = ordered > -torch.inf
    always = (ordered == torch.inf).sum(-1, keepdim=True)
    first = eligible & (token < always.clamp(min=num_top))
    if num_top < budget:
        if buckets is None:
            bucket = token * num_buckets // length.clamp(min=1)
        else:
            bucket = torch.where((buckets >= 0) & (buckets < num_buckets), buckets, num_buckets)
        bucket = bucket.clamp(max=num_buckets).gather(-1, order)  # num_buckets: in no bucket
        second = eligible & ~first & (rank_in_bucket(bucket) < bucket_capacity) & (bucket < num_buckets)
    else:
        second = torch.zeros_like(first)
    third = eligible & ~first & ~second

    place = torch.where(first, token, 0)
    start = first.sum(-1, keepdim=True)
    for members in (second, third):
        place = torch.where(members, start + members.cumsum(-1) - 1, place)
        start = start + members.sum(-1, keepdim=True)
    taken = eligible & (place < budget)
    keep = torch.zeros_like(taken).scatter(-1, order, taken)
    return sorted_indices(keep, budget), keep.sum(-1, dtype=torch.int32)


def rank_in_bucket(bucket: Tensor) -> Tensor:
    """bucket [B, L] -> how many earlier entries of the row have the same bucket."""
    grouped, order = torch.sort(bucket, dim=-1, stable=True)
    place = torch.arange(bucket.shape[-1], device=bucket.device).expand_as(order)
    starts = torch.ones_like(grouped, dtype=torch.bool)
    starts[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    run_start = torch.where(starts, place, 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, place - run_start)


def sorted_indices(keep: Tensor, width: int) -> Tensor:
    """keep [B, L] bool -> int32 [B, width]: indices of the first `width` kept entries, ascending, then -1."""
    place = torch.where(keep, keep.cumsum(-1) - 1, width).clamp(max=width)
    token = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand_as(keep)
    # Everything that is not kept lands in one spare column, which is cut off.
    spare = torch.full((keep.shape[0], width + 1), -1, dtype=torch.int32, device=keep.device)
    return spare.scatter(-1, place, token)[:, :width].contiguous()
