# SPDX-License-Identifier: Apache-2.0
"""Definition of `score_tokens`; arguments are checked and documented in `livevlm_kernels/score_tokens.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks
from livevlm_kernels.reference._rope import rotate


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
    batch, num_queries, num_qo_heads, _ = q.shape
    _, seq_len, num_kv_heads, _ = k.shape
    group_size = num_qo_heads // num_kv_heads
    token = torch.arange(seq_len, device=k.device)
    length = torch.full((batch,), seq_len, device=k.device) if seq_lens is None else seq_lens.clamp(0, seq_len)
    end = length[:, None]  # keys before it are seen: [B, 1], or [B, R] if causal
    if causal:
        end = end - num_queries + 1 + torch.arange(num_queries, device=k.device)
    grouped = q.unflatten(2, (num_kv_heads, group_size)).permute(0, 2, 3, 1, 4)  # [B, H, G, R, D]

    scores = torch.empty((batch, num_kv_heads, seq_len), dtype=torch.float32, device=k.device)
    logits_each = group_size * num_queries * seq_len
    for rows in chunks(batch, num_kv_heads * logits_each):
        hidden = token >= end[rows, :, None]
        for heads in chunks(num_kv_heads, (rows.stop - rows.start) * logits_each):
            keys = k[rows, :, heads].float()
            if positions is not None and cos_sin_cache is not None:
                keys = rotate(keys, positions[rows, :, None], cos_sin_cache)
            queries = grouped[rows, heads].flatten(2, 3).float() * sm_scale
            logits = torch.matmul(queries, keys.permute(0, 2, 3, 1))  # [b, h, G * R, L], from here on in place
            if causal or seq_lens is not None:
                logits.unflatten(2, (group_size, num_queries)).masked_fill_(hidden[:, None, None], -torch.inf)
            # A row that sees nothing has the maximum -inf, and -inf - -inf is NaN.
            top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            weights = logits.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            share = torch.where(total == 0, 0.0, 1 / (total * (group_size * num_queries)))
            scores[rows, heads] = torch.matmul(share.transpose(2, 3), weights).squeeze(2)
    if per_head:
        return scores
    return scores.mean(1).view(-1, num_shared, seq_len).mean(1)
