# SPDX-License-Identifier: Apache-2.0
"""What the ops are compared with: plain torch as one would write it by hand, and the formulas of other projects.

The functions named like an op compute what it computes, for all layers in one call, in the fewest and cheapest steps we
know, with bf16 products where the inputs are bf16. They know more than the ops may (whole frames, every second token),
write new tensors instead of updating the memory, and check nothing. The formulas of others are re-implemented from
their papers and code; sources are in the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def each_layer(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Any]:
    """A Python loop over layers, as implementations inside a model's layers are."""
    return [function(*(t[layer : layer + 1] for t in tensors)) for layer in range(tensors[0].shape[0])]


def take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [B, n] of [B, L, ...], as a new tensor."""
    return tensor[torch.arange(tensor.shape[0], device=tensor.device)[:, None], indices.long()]


# ---------------------------------------------------------------- scores
def rotated(k: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> Tensor:
    """Keys after RoPE, in their own dtype and with the same positions in all layers, as transformers does it."""
    cos, sin = cos_sin_cache[positions[:1].long()].to(k.dtype)[:, :, None].chunk(2, -1)
    first, second = k.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def score_tokens(
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    reduction: str = "layer",
) -> Tensor:
    """Softmax in float32 over bf16 logits; the query heads of a KV head go through one product."""
    if positions is not None and cos_sin_cache is not None:
        k = rotated(k, positions, cos_sin_cache)
    queries = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * q.shape[-1] ** -0.5
    logits = queries @ k.permute(0, 2, 3, 1)
    scores = logits.softmax(-1, dtype=torch.float32).mean((1, 2))
    return scores.mean(0) if reduction == "shared" else scores


def kvpress_snapkv(q: Tensor, k: Tensor) -> Tensor:
    """SnapKV (arXiv 2404.14469) as in kvpress' `SnapKVPress`: repeat keys to all heads, softmax of the window's logits,
    mean over the window, mean over each group of heads.

    Left out: its causal mask inside the window, the average pooling over 5 tokens (it smooths text), and the window's
    own scores. It keeps KV heads apart.
    """
    group_size = q.shape[2] // k.shape[2]
    keys = k.transpose(1, 2)[:, :, None].expand(-1, -1, group_size, -1, -1).flatten(1, 2)
    logits = q.transpose(1, 2) @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights.mean(-2).unflatten(1, (-1, group_size)).mean(2)


def score_redundancy(
    k: Tensor, v: Tensor, recent_k: Tensor, slots: Tensor, *, per_head: bool = False
) -> tuple[Tensor, Tensor]:
    """The mean of cosines is a product with the mean of the recent unit keys."""
    patch = take(F.normalize(recent_k, dim=-1).mean(1), slots)
    similarity = (F.normalize(k, dim=-1) * patch).sum(-1, dtype=torch.float32)
    value_norm = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    if per_head:
        return similarity.transpose(1, 2), value_norm.transpose(1, 2)
    return similarity.mean(-1), value_norm.mean(-1)


def score_novelty(x: Tensor, usual: Tensor, slots: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are gathered and subtracted; every token has a slot, and -1 stands for the last token."""
    own = x.flatten(2).float()
    change = own - take(usual.flatten(2), slots)
    step = own - take(x.flatten(2), previous)
    return torch.linalg.vector_norm(change, dim=-1), torch.linalg.vector_norm(step, dim=-1)


def infinipot_v_scores(k: Tensor, v: Tensor, num_recent_frames: int, tokens_per_frame: int) -> tuple[Tensor, Tensor]:
    """TaR and VaN of InfiniPot-V (arXiv 2506.15745) for whole frames, `[B, H, L]`: the cosine of every key to the same
    patch's in each recent frame, mean over these; norms of the values. TaR keeps what has the lowest. Left out: its
    pooling of value norms over neighbours, which depends on the layer.
    """
    frames = k.unflatten(1, (-1, tokens_per_frame))
    recent = frames[:, frames.shape[1] - num_recent_frames :]
    similarity = F.cosine_similarity(frames[:, :, None], recent[:, None], dim=-1).float().mean(2)
    return similarity.flatten(1, 2).transpose(1, 2), v.norm(dim=-1, dtype=torch.float32).transpose(1, 2)


# ---------------------------------------------------------------- selection and eviction
def select_tokens(scores: Tensor, budget: int, *, scatter_ratio: float = 0.0) -> tuple[Tensor, None]:
    """Top-k, or Vision Sink Bucketing with one token a bucket; no equal scores but infinite ones.

    Ranks stand in for scores, so that one top-k serves the three phases: the best, then winners of buckets, then the
    rest.
    """
    seq_len = scores.shape[-1]
    if scatter_ratio == 0:
        return scores.topk(budget, sorted=False).indices.sort(-1).values.int(), None
    token = torch.arange(seq_len, device=scores.device).expand_as(scores)
    order = scores.sort(-1, descending=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, token)
    bucket = token * budget // seq_len
    best = rank.new_full((*rank.shape[:-1], budget), seq_len).scatter_reduce(-1, bucket, rank, "amin")
    winner = rank == best.gather(-1, bucket)
    phase = torch.where(rank < round((1 - scatter_ratio) * budget), 0, torch.where(winner, 1, 2))
    kept = (phase * seq_len + rank).topk(budget, largest=False, sorted=False).indices
    return kept.sort(-1).values.int(), None


def compact_tokens(tensors: Sequence[Tensor], indices: Tensor, *, per_head: bool = False) -> list[Tensor]:
    """New tensors with the kept rows."""
    if not per_head:
        return [take(t, indices) for t in tensors]
    index = indices.long().transpose(1, 2)[..., None]
    return [t.gather(1, index.expand(-1, -1, -1, t.shape[-1])) for t in tensors]


def compact_in_place(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """The same, copied back to the front of the memory."""
    for t, rows in zip(tensors, compact_tokens(tensors, indices), strict=True):
        t[:, : rows.shape[1]] = rows
    return [t[:, : indices.shape[-1]] for t in tensors]


def evict_similar(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    budget: int,
    *,
    num_recent_frames: int,
    tokens_per_frame: int,
    alpha: float = 0.5,
    shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, two top-k, a sort and two gathers: kept indices, keys, values."""
    recent = num_recent_frames * tokens_per_frame
    past = k.shape[1] - recent
    recent_k = k[:, past:].unflatten(1, (num_recent_frames, tokens_per_frame))
    similarity, value_norm = score_redundancy(k, v, recent_k, slots)
    if shared:
        similarity = similarity.mean(0, keepdim=True)
        value_norm = (value_norm / value_norm.mean(-1, keepdim=True)).mean(0, keepdim=True)
    indices = dissimilar_and_valuable(similarity, value_norm, past, budget, round(alpha * (budget - recent)))
    indices = indices.expand(k.shape[0], -1)
    return indices, take(k, indices), take(v, indices)


def dissimilar_and_valuable(
    similarity: Tensor, value_norm: Tensor, past: int, budget: int, num_dissimilar: int
) -> Tensor:
    """Sorted indices of `num_dissimilar` low similarities, high norms of others, and all tokens from `past` on."""
    recent = torch.arange(past, similarity.shape[-1], device=similarity.device).expand(*similarity.shape[:-1], -1)
    dissimilar = similarity[..., :past].topk(num_dissimilar, largest=False, sorted=False).indices
    rest = value_norm[..., :past].scatter(-1, dissimilar, -torch.inf)
    valuable = rest.topk(budget - recent.shape[-1] - num_dissimilar, sorted=False).indices
    return torch.cat((dissimilar, valuable, recent), -1).sort(-1).values.int()


def infinipot_v_evict(
    k: Tensor, v: Tensor, budget: int, *, num_recent_frames: int, tokens_per_frame: int, alpha: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """InfiniPot-V's compression: each KV head keeps its recent frames, `alpha` of the rest by TaR, others by VaN."""
    recent = num_recent_frames * tokens_per_frame
    similarity, value_norm = infinipot_v_scores(k, v, num_recent_frames, tokens_per_frame)
    num_dissimilar = round(alpha * (budget - recent))
    indices = dissimilar_and_valuable(similarity, value_norm, k.shape[1] - recent, budget, num_dissimilar)
    return indices, *compact_tokens([k, v], indices, per_head=True)


# ---------------------------------------------------------------- merging
Merged = tuple[Tensor, Tensor, Tensor]


def merge_frames(k: Tensor, v: Tensor, num_groups: int, weights: Tensor | None = None) -> Merged:
    """One mean a frame, plain (LiveVLM v1) or weighted (StreamMem, arXiv 2508.15717), of whole frames: no scatter."""
    frames = [x.unflatten(1, (num_groups, -1)) for x in (k, v)]
    if weights is None:
        sizes = torch.full((k.shape[0], num_groups), k.shape[1] / num_groups, device=k.device)
        k_out, v_out = (x.mean(2, dtype=torch.float32).to(x.dtype) for x in frames)
        return k_out, v_out, sizes
    weight = weights.unflatten(1, (num_groups, -1))
    share = weight / weight.sum(-1, keepdim=True)
    k_out, v_out = ((x * share[..., None, None]).sum(2).to(x.dtype) for x in frames)
    return k_out, v_out, weight.sum(-1)


def merge_groups(k: Tensor, v: Tensor, groups: Tensor, num_groups: int, weights: Tensor | None = None) -> Merged:
    """Any groups: sums by scatter_add in float32, divided by their sizes."""
    weight = torch.ones_like(groups, dtype=torch.float32) if weights is None else weights
    sizes = weight.new_zeros(k.shape[0], num_groups).scatter_add(1, groups.long(), weight)

    def mean(x: Tensor) -> Tensor:
        flat = x.flatten(2).float() * weight[..., None]
        sums = flat.new_zeros(k.shape[0], num_groups, flat.shape[-1])
        sums = sums.scatter_add(1, groups.long()[..., None].expand_as(flat), flat)
        return (sums / sizes[..., None]).to(x.dtype).unflatten(2, x.shape[2:])

    return mean(k), mean(v), sizes


def merge_pairs(k: Tensor, v: Tensor) -> Merged:
    """Every odd token goes to the even one with the nearest key, all heads as one vector; plain means."""
    unit = F.normalize(k.flatten(2), dim=-1)
    return fold_odd(k, v, (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).argmax(-1))


def fold_odd(k: Tensor, v: Tensor, target: Tensor) -> Merged:
    """Adds odd tokens to the even ones that `target` names, in float32, and divides by the number of tokens."""
    sizes = torch.ones(target.shape[0], (k.shape[1] + 1) // 2, device=k.device)
    sizes = sizes.scatter_add(1, target, torch.ones_like(target, dtype=torch.float32))

    def mean(x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        sums = flat[:, ::2].scatter_add(1, target[..., None].expand(-1, -1, flat.shape[-1]), flat[:, 1::2])
        return (sums / sizes[..., None]).to(x.dtype).unflatten(2, x.shape[2:])

    return mean(k), mean(v), sizes


def tome(k: Tensor, v: Tensor) -> Merged:
    """ToMe's bipartite soft matching (arXiv 2210.09461) with all of the odd half merged: the metric is the mean of the
    keys over heads, normalised; each source goes to its most similar destination; means by scatter, sizes tracked.
    """
    metric = F.normalize(k.mean(2), dim=-1)
    return fold_odd(k, v, (metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)).max(-1).indices)


def kvpress_merging(k: Tensor, v: Tensor) -> Merged:
    """kvpress' `MergingPress`: for each KV head, values of evicted tokens are added to the survivor with the nearest
    key, weighted by similarity and by the share of their norm; keys of survivors stay. Its list of evicted tokens comes
    from `nonzero`, which waits for the GPU; here it is known (every odd token).
    """
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    kept, evicted = values[:, :, ::2], values[:, :, 1::2]
    unit = F.normalize(keys.float(), dim=-1)
    similarity, target = (unit[:, :, 1::2] @ unit[:, :, ::2].transpose(-2, -1)).max(-1)
    kept_norm, evicted_norm = kept.float().norm(dim=-1).gather(-1, target), evicted.float().norm(dim=-1)
    weight = similarity.clamp(min=0) * evicted_norm / (evicted_norm + kept_norm + 1e-6)
    sums = torch.zeros_like(kept, dtype=torch.float32)
    sums = sums.scatter_add(2, target[..., None].expand_as(evicted), weight[..., None] * evicted.float())
    total = torch.zeros_like(weight).scatter_add(2, target, weight)
    merged = ((kept.float() + sums) / (1 + total)[..., None]).to(v.dtype)
    return keys[:, :, ::2].contiguous(), torch.where((total > 0)[..., None], merged, kept), total


# ---------------------------------------------------------------- summaries
def summarize_blocks(k: Tensor, *, block_size: int) -> Tensor:
    """Means of whole blocks."""
    return k.unflatten(1, (-1, block_size)).mean(2, dtype=torch.float32)
