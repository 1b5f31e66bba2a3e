# SPDX-License-Identifier: Apache-2.0
"""Definition of `score_redundancy`; arguments are checked and documented in `livevlm_kernels/score_redundancy.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks


def score_redundancy(
    k: Tensor, v: Tensor, recent_k: Tensor, slots: Tensor, seq_lens: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """k, v [B, L, H, D], recent_k [B, F, T, H, D], slots [B, L] -> similarity, value_norm [B, (H,) L]."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    tokens_per_frame = recent_k.shape[2]
    token = torch.arange(seq_len, device=k.device)
    length = torch.full((batch,), seq_len, device=k.device) if seq_lens is None else seq_lens
    valid = token < length[:, None]
    has_slot = (valid & (slots >= 0) & (slots < tokens_per_frame))[:, :, None]
    slot = slots.clamp(0, tokens_per_frame - 1).long()

    similarity = torch.empty((batch, num_kv_heads, seq_len), dtype=torch.float32, device=k.device)
    value_norm = torch.empty_like(similarity)
    for rows in chunks(batch, seq_len * num_kv_heads * head_dim):
        # The mean of cosines over frames is one dot product with the mean of the recent unit keys.
        patch = unit(recent_k[rows].float()).mean(1)  # [b, T, H, D]
        row = torch.arange(patch.shape[0], device=k.device)[:, None]
        cosine = (unit(k[rows].float()) * patch[row, slot[rows]]).sum(-1)  # [b, L, H]
        similarity[rows] = torch.where(has_slot[rows], cosine, 0.0).transpose(1, 2)
        norm = torch.linalg.vector_norm(v[rows], dim=-1, dtype=torch.float32)
        value_norm[rows] = torch.where(valid[rows, :, None], norm, 0.0).transpose(1, 2)
    if per_head:
        return similarity, value_norm
    return similarity.mean(1), value_norm.mean(1)


def unit(x: Tensor) -> Tensor:
    """`x` with length 1 along its last dimension; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)
