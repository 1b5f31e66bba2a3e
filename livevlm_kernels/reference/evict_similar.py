# SPDX-License-Identifier: Apache-2.0
"""Definition of `evict_similar`; arguments are checked and documented in `livevlm_kernels/evict_similar.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference.compact_tokens import compact_tokens
from livevlm_kernels.reference.score_redundancy import score_redundancy
from livevlm_kernels.reference.select_tokens import select_tokens


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
    if num_shared > 1:
        # Value norms grow with depth: without this the last layers alone would decide.
        mean_norm = value_norm.mean(-1, keepdim=True)
        value_norm = value_norm / torch.where(mean_norm == 0, 1.0, mean_norm)
        similarity = similarity.view(-1, num_shared, seq_len).mean(1)
        value_norm = value_norm.view(-1, num_shared, seq_len).mean(1)
    similarity, value_norm = similarity.flatten(0, -2), value_norm.flatten(0, -2)

    kept = torch.arange(seq_len, device=k.device).expand_as(value_norm) >= past
    if num_dissimilar > 0:
        score = torch.where(kept, -torch.inf, -similarity)
        chosen, _ = select_tokens(score, None, None, num_dissimilar, num_dissimilar, 1, 1)
        kept = kept | mark(chosen, seq_len)
    score = torch.where(kept, torch.inf, value_norm)
    indices, counts = select_tokens(score, None, None, budget, budget, 1, 1)

    indices = indices.repeat_interleave(num_shared, 0)
    counts = counts.repeat_interleave(num_shared, 0)
    if per_head:
        indices, counts = indices.view(batch, num_kv_heads, budget), counts.view(batch, num_kv_heads)
    compact_tokens([k, v, *tensors], indices, per_head)
    return indices, counts


def mark(indices: Tensor, seq_len: int) -> Tensor:
    """indices [B, n], -1 padded -> bool [B, seq_len], True at the indices."""
    marks = torch.zeros((indices.shape[0], seq_len + 1), dtype=torch.bool, device=indices.device)
    index = torch.where((indices >= 0) & (indices < seq_len), indices, seq_len).long()
    return marks.scatter(-1, index, True)[:, :seq_len]
