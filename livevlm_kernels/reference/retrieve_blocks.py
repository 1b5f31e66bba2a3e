# SPDX-License-Identifier: Apache-2.0
"""Definition of `retrieve_blocks`; arguments are checked and documented in `livevlm_kernels/retrieve_blocks.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from livevlm_kernels.reference.score_tokens import score_tokens
from livevlm_kernels.reference.select_tokens import sorted_indices

MEAN, MINMAX, MASS = range(3)


def retrieve_blocks(
    q: Tensor,
    keys: Tensor,
    seq_lens: Tensor | None,
    kind: int,
    softmax: bool,
    num_selected: int,
    ratio: float | None,
    block_size: int,
    num_sink_blocks: int,
    num_recent_blocks: int,
    per_head: bool,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """q [B, R, Hq, D], keys [B, N, (2,) H, D] -> block_table [B, (H,) num_selected], counts [B, (H)]."""
    batch, entries, num_kv_heads = keys.shape[0], keys.shape[1], keys.shape[-2]
    length = torch.full((batch,), entries, device=keys.device) if seq_lens is None else seq_lens.clamp(0, entries)
    num_valid = -(-length // block_size)  # [B]; block_size is 1 unless keys are tokens
    block = torch.arange(-(-entries // block_size), device=keys.device)
    valid = (block < num_valid[:, None])[:, None]  # [B, 1, N]
    if kind == MASS:
        mass = score_tokens(q, keys, length, None, None, sm_scale, False, True, 1)
        mass = F.pad(mass, (0, block.numel() * block_size - entries))
        scores = mass.unflatten(-1, (-1, block_size)).sum(-1)  # [B, H, N]
    elif softmax:
        logits = block_logits(q, keys, kind) * sm_scale
        logits = torch.where(valid[:, :, None], logits, -torch.inf)
        weights = torch.where(valid[:, :, None], logits.softmax(-1), 0.0)  # no valid block: softmax is NaN
        scores = weights.sum(2)
    else:
        scores = block_logits(q.float().mean(1, keepdim=True), keys, kind).sum(2)
    if not per_head:
        scores = scores.sum(1, keepdim=True)

    always = (block < num_sink_blocks) | (block >= num_valid[:, None] - num_recent_blocks)
    scores = torch.where(always[:, None], torch.inf, scores.nan_to_num(-torch.inf, torch.inf, -torch.inf) + 0.0)
    scores = torch.where(valid, scores, -torch.inf)
    width = num_valid.clamp(max=num_selected)
    if ratio is not None:
        # 1e-6 keeps 0.07 * 100 = 7.000000000000001 at 7 blocks.
        share = (num_valid.double() * ratio - 1e-6).ceil().long()
        width = width.minimum(share.clamp(min=num_sink_blocks + num_recent_blocks))
    scores = scores.flatten(0, 1)  # [B * (H or 1), N]
    width = width.repeat_interleave(scores.shape[0] // batch, 0)
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    taken = (block < width[:, None]) & (ordered > -torch.inf)
    keep = torch.zeros_like(taken).scatter(-1, order, taken)
    shape = (batch, num_kv_heads) if per_head else (batch,)
    counts = keep.sum(-1, dtype=torch.int32).view(shape)
    return sorted_indices(keep, num_selected).view(*shape, num_selected), counts


def block_logits(q: Tensor, keys: Tensor, kind: int) -> Tensor:
    """q [B, R, Hq, D], summaries [B, N, (2,) H, D] -> [B, H, G * R, N]: dot products, or Quest's upper bounds."""
    num_kv_heads = keys.shape[-2]
    queries = q.float().unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H, G * R, D]
    if kind == MEAN:
        return queries @ keys.float().permute(0, 2, 3, 1)
    low, high = keys.float().permute(0, 3, 4, 1, 2).unbind(-1)  # [B, H, D, N]
    # max(q * low, q * high) is q * high where q is positive and q * low where it is negative.
    return queries.clamp(min=0) @ high + queries.clamp(max=0) @ low
