# SPDX-License-Identifier: Apache-2.0
"""Definition of `merge_tokens`; arguments are checked and documented in `livevlm_kernels/merge_tokens.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks
from livevlm_kernels.reference.score_redundancy import unit


def merge_tokens(
    k: Tensor,
    v: Tensor,
    groups: Tensor | None,
    indices: Tensor | None,
    sizes: Tensor | None,
    weights: Tensor | None,
    seq_lens: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, L, H, D] -> k_out, v_out [B, num_groups, H, D], sizes_out [B, num_groups]."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    token = torch.arange(seq_len, device=k.device)
    length = torch.full((batch,), seq_len, device=k.device) if seq_lens is None else seq_lens
    valid = token < length[:, None]
    if indices is not None:
        groups = nearest_survivor(k, indices, valid)
    assert groups is not None
    group = torch.where(valid & (groups >= 0) & (groups < num_groups), groups, num_groups).long()
    weight = torch.ones((batch, seq_len), device=k.device)
    for factor in (sizes, weights):
        weight = weight if factor is None else weight * factor.float()

    # Atomic additions would sum in another order every time: sort by group, then sum every run in token order. Dropped
    # tokens come last, behind all runs, and are not read.
    group, order = torch.sort(group, dim=-1, stable=True)
    bounds = torch.arange(num_groups + 1, device=k.device).expand(batch, -1).contiguous()
    offsets = torch.searchsorted(group, bounds)
    weight = weight.gather(-1, order)
    sizes_out = segment_sum(weight[:, :, None], offsets)[:, :, 0]

    k_out = torch.empty((batch, num_groups, num_kv_heads, head_dim), dtype=k.dtype, device=k.device)
    v_out = torch.empty_like(k_out)
    for rows in chunks(batch, seq_len * num_kv_heads * head_dim):
        row = torch.arange(rows.stop - rows.start, device=k.device)[:, None]
        total = sizes_out[rows, :, None, None]
        for x, out in ((k, k_out), (v, v_out)):
            grouped = x[rows][row, order[rows]].float() * weight[rows, :, None, None]
            sums = segment_sum(grouped.flatten(2), offsets[rows]).view(-1, *out.shape[1:])
            out[rows] = torch.where(total == 0, 0.0, sums / total).to(out.dtype)
    return k_out, v_out, sizes_out.contiguous()


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """x [B, L, C], offsets [B, G + 1] -> [B, G, C]: sums of rows offsets[g]..offsets[g + 1] - 1, in order."""
    # unsafe only skips reading `offsets` on the host.
    return torch.segment_reduce(x.contiguous(), "sum", offsets=offsets, axis=1, unsafe=True, initial=0)


def nearest_survivor(k: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """indices [B, n] -> [B, L]: a survivor's own row, else the row of the survivor with the nearest key; -1 if none."""
    batch, seq_len = valid.shape
    inside = (indices >= 0) & (indices < seq_len)
    index = indices.clamp(0, seq_len - 1).long()
    survives = inside & valid.gather(-1, index)
    num_rows = indices.shape[1]
    nearest = torch.empty((batch, seq_len), dtype=torch.long, device=k.device)
    for b in range(batch):
        keys = unit(k[b].flatten(1).float())
        targets = keys[index[b]].T
        for part in chunks(seq_len, num_rows):
            cosine = torch.where(survives[b], keys[part] @ targets, -torch.inf)
            nearest[b, part] = cosine.argmax(-1)  # the first of several maxima
    nearest = torch.where(survives.any(-1, keepdim=True), nearest, -1)
    own_row = torch.arange(num_rows, device=k.device).expand_as(index)
    spare = torch.cat((nearest, nearest[:, :1]), 1)  # survivors keep their own row; padding lands in the spare column
    return spare.scatter(-1, torch.where(survives, index, seq_len), own_row)[:, :seq_len]
