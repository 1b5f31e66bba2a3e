# SPDX-License-Identifier: Apache-2.0
"""Definition of `compact_tokens`; arguments are checked and documented in `livevlm_kernels/compact_tokens.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_tokens(tensors: list[Tensor], indices: Tensor, per_head: bool) -> None:
    """tensors [B, L, (H,) ...], indices [B, (H,) n] -> row j becomes row indices[j], in place.

    All rows are gathered before the first is written: front rows are sources too, and running out of memory on the way
    leaves every tensor as it was.
    """
    rows_of = (indices.transpose(1, 2) if per_head else indices).long()  # [B, n, (H)]
    num_rows = rows_of.shape[1]
    batch = torch.arange(rows_of.shape[0], device=indices.device).view(-1, *[1] * (rows_of.dim() - 1))
    heads = (torch.arange(rows_of.shape[2], device=indices.device),) if per_head else ()
    writes = []
    for whole in tensors:
        # Moving bytes is all that is needed, and not every one-byte dtype can be indexed.
        tensor = whole.view(torch.uint8) if whole.itemsize == 1 else whole
        seq_len, front = tensor.shape[1], tensor[:, :num_rows]
        inside = ((rows_of >= 0) & (rows_of < seq_len)).view(*rows_of.shape, *[1] * (tensor.dim() - rows_of.dim()))
        source = (batch, rows_of.clamp(0, seq_len - 1), *heads)
        moved = tensor[source]
        writes.append((front, torch.where(inside, moved, front)))
    for front, rows in writes:
        front.copy_(rows)
