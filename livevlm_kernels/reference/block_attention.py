# SPDX-License-Identifier: Apache-2.0
"""Definition of `block_attention`; arguments are checked and documented in `livevlm_kernels/block_attention.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks
from livevlm_kernels.reference._rope import rotate
from livevlm_kernels.reference.quantize_blocks import dequantize


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    q_positions: Tensor | None,
    packed: bool,
    sm_scale: float,
    causal: bool,
    window: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [Q, Hq, D], pools [N, S, H, D], block_table [B, (H,) M] -> out [Q, Hq, D], lse [Q, Hq]; window 0: none."""
    if k_scale is not None and v_scale is not None:
        k, v = dequantize(k, k_scale, True), dequantize(v, v_scale, False)
    num_blocks, block_size, num_kv_heads, head_dim = k.shape
    total_q, num_qo_heads, _ = q.shape
    batch = block_table.shape[0]
    table = block_table if block_table.dim() == 3 else block_table[:, None].expand(-1, num_kv_heads, -1)
    grouped = q.float().unflatten(1, (num_kv_heads, -1))
    if q_positions is not None and cos_sin_cache is not None:
        grouped = rotate(grouped, q_positions.view(-1, 1, 1), cos_sin_cache)
    out = torch.zeros((total_q, num_kv_heads, num_qo_heads // num_kv_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    token = torch.arange(table.shape[-1] * block_size, device=q.device)  # index of a key in table order

    for b in range(batch):
        if cu_seqlens_q is None:
            num_queries: int | Tensor = total_q // batch
            rows = range(b * total_q // batch, (b + 1) * total_q // batch)
            index = torch.arange(len(rows), device=q.device)
        else:
            # Where the sequence starts is known on the device only: compute every row, use those that belong to it.
            rows = range(total_q)
            index = torch.arange(total_q, device=q.device) - cu_seqlens_q[b]
            num_queries = cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        mine = (index >= 0) & (index < num_queries)
        last = seq_lens[b] - num_queries + index  # the query's own index among the keys
        end = last + 1 if causal else seq_lens[b].expand_as(last)
        start = last - window + 1 if window else torch.zeros_like(last)
        for h in range(num_kv_heads):
            block = table[b, h].clamp(0, num_blocks - 1).long()
            present = (table[b, h] == block)[:, None].expand(-1, block_size)
            keys = k[block, :, h].float().flatten(0, 1)
            where_from = token
            if positions is not None:
                present = present & (positions[block] >= 0)
                where_from = token if packed else positions[block].flatten()
            if cos_sin_cache is not None:
                keys = rotate(keys, where_from, cos_sin_cache)
            visible = present.flatten() & (token < seq_lens[b])
            values = torch.where(visible[:, None], v[block, :, h].flatten(0, 1).float(), 0.0)
            for part in chunks(len(rows), token.numel() * grouped.shape[2]):
                seen = visible & (token >= start[part, None]) & (token < end[part, None])
                where = slice(rows.start + part.start, rows.start + part.stop)
                logits = (grouped[where, h] * sm_scale) @ keys.T  # [rows, G, keys], from here on in place
                logits.masked_fill_(~seen[:, None], -torch.inf)
                top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
                weights = logits.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                result = weights @ values / torch.where(total == 0, 1.0, total)
                mask = mine[part, None]
                out[where, h] = torch.where(mask[..., None], result.to(out.dtype), out[where, h])
                lse[where, h] = torch.where(mask, (top + total.log()).squeeze(-1), lse[where, h])
    return out.view(total_q, num_qo_heads, head_dim), lse.view(total_q, num_qo_heads)
