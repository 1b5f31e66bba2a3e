# SPDX-License-Identifier: Apache-2.0
"""Definition of `compact_tokens`; arguments are checked and documented in `livevlm_kernels/compact_tokens.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from livevlm_kernels.reference._chunks import chunks


def compact_tokens(tensors: list[Tensor], indices: Tensor, per_head: bool) -> None:
    """tensors [B, L, (H,) ...], indices [B, (H,) n] -> row j becomes row indices[j], in place."""
    rows_of = indices.transpose(1, 2) if per_head else indices  # [B, n, (H)]
    for whole in tensors:
        # Moving bytes is all that is needed, and not every one-byte dtype can be indexed.
        tensor = whole.view(torch.uint8) if whole.itemsize == 1 else whole
        batch, seq_len, *rest = tensor.shape
        num_rows = rows_of.shape[1]
        for part in chunks(batch, num_rows * math.prod(rest)):
            index = rows_of[part].long()
            row = torch.arange(index.shape[0], device=index.device).view(-1, *[1] * (index.dim() - 1))
            heads = (torch.arange(index.shape[2], device=index.device),) if per_head else ()
            source = (row, index.clamp(0, seq_len - 1), *heads)
            moved = tensor[part][source]  # a copy: front rows are sources too
            inside = ((index >= 0) & (index < seq_len)).view(*index.shape, *[1] * (tensor.dim() - index.dim()))
            front = tensor[part, :num_rows]
            front.copy_(torch.where(inside, moved, front))
