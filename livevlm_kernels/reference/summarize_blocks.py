# SPDX-License-Identifier: Apache-2.0
"""Definition of `summarize_blocks`; arguments are checked and documented in `livevlm_kernels/summarize_blocks.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def summarize_blocks(
    k: Tensor, seq_lens: Tensor | None, first_token: Tensor | None, block_size: int, minmax: bool, out: Tensor
) -> None:
    """k [B, L, H, D] -> out [B, ceil(L / block_size), (2,) H, D] float32, written in place."""
    batch, seq_len, num_kv_heads, head_dim = k.shape
    num_blocks = -(-seq_len // block_size)
    token = torch.arange(num_blocks * block_size, device=k.device)
    length = torch.full((batch,), seq_len, device=k.device) if seq_lens is None else seq_lens.clamp(0, seq_len)
    valid = (token < length[:, None]).view(batch, num_blocks, block_size, 1, 1)

    padded = F.pad(k.float(), (0, 0, 0, 0, 0, num_blocks * block_size - seq_len))
    blocks = padded.view(batch, num_blocks, block_size, num_kv_heads, head_dim)
    count = valid.sum(2)
    if minmax:
        low = torch.where(valid, blocks, torch.inf).amin(2)
        high = torch.where(valid, blocks, -torch.inf).amax(2)
        result = torch.where((count > 0)[:, :, None], torch.stack((low, high), 2), 0.0)
    else:
        # Slots past the sequence's end may hold anything, NaN included: select, do not multiply.
        result = torch.where(valid, blocks, 0.0).sum(2) / count.clamp(min=1)

    if first_token is not None:
        block_end = (torch.arange(num_blocks, device=k.device) + 1) * block_size
        changed = (block_end > first_token[:, None]).view(batch, num_blocks, *[1] * (out.dim() - 2))
        result = torch.where(changed, result, out)
    out.copy_(result)
