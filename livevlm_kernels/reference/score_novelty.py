# SPDX-License-Identifier: Apache-2.0
"""Definition of `score_novelty`; arguments are checked and documented in `livevlm_kernels/score_novelty.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks


def score_novelty(
    x: Tensor, usual: Tensor, slots: Tensor, previous: Tensor, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, L, H, D], usual [B, T, H, D], slots and previous [B, L] -> change, step [B, L]."""
    batch, seq_len, num_kv_heads, head_dim = x.shape
    tokens_per_frame = usual.shape[1]
    token = torch.arange(seq_len, device=x.device)
    length = torch.full((batch,), seq_len, device=x.device) if seq_lens is None else seq_lens
    length = length.clamp(max=seq_len)[:, None]
    valid = token < length
    change = torch.empty((batch, seq_len), dtype=torch.float32, device=x.device)
    step = torch.empty_like(change)
    for rows in chunks(batch, seq_len * num_kv_heads * head_dim):
        own = x[rows].float()
        row = torch.arange(own.shape[0], device=x.device)[:, None]
        for result, others, index, count in (
            (change, usual[rows], slots[rows], tokens_per_frame),
            (step, own, previous[rows], length[rows]),
        ):
            found = (index >= 0) & (index < count)
            other = others[row, torch.where(found, index, 0).long()]
            distance = torch.linalg.vector_norm((own - other).flatten(2), dim=-1)
            result[rows] = torch.where(valid[rows], torch.where(found, distance, torch.inf), 0.0)
    return change, step
