# SPDX-License-Identifier: Apache-2.0
"""Definition of `quantize_blocks`; arguments are checked and documented in `livevlm_kernels/quantize_blocks.py`."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
INT4_MAX = 15


def quantize_blocks(
    k: Tensor, v: Tensor, positions: Tensor | None, int4: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [B, N, S, H, D], positions [B or 1, N, S] -> codes uint8 [B, N, S, H, D or D / 2], scales or pairs."""
    present = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device) if positions is None else positions >= 0
    present = present[..., None, None]
    quantize = _int4 if int4 else _fp8
    (k_codes, k_scale), (v_codes, v_scale) = quantize(k, present, (2,)), quantize(v, present, (4,))
    return k_codes.contiguous(), v_codes.contiguous(), k_scale.contiguous(), v_scale.contiguous()


def _fp8(x: Tensor, present: Tensor, _: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Elements over their scale, the largest magnitude of a block and head over 448; 0 for what is not a number."""
    x = torch.where(present, x.float(), 0.0)
    scale = x.abs().amax((2, 4), keepdim=True) / _divisor(E4M3_MAX, x)
    codes = (x / scale).nan_to_num(0.0, E4M3_MAX, -E4M3_MAX).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale[:, :, 0, :, 0]


def _divisor(value: float, like: Tensor) -> Tensor:
    """A tensor: on a GPU, torch would multiply by the rounded inverse of a number."""
    return torch.full((), value, device=like.device)


def _int4(x: Tensor, present: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Steps above the least of what shares a pair (scale, minimum), which is rounded to float16 first."""
    exact = x.float()
    low = torch.where(present, exact, torch.inf).amin(dims, keepdim=True)
    high = torch.where(present, exact, -torch.inf).amax(dims, keepdim=True)
    some = present.expand(x.shape).any(dims[0], keepdim=True)
    scale = torch.where(some, (high - low) / _divisor(INT4_MAX, exact), 0.0).half()
    low = torch.where(some, low, 0.0).half()
    steps = torch.where(present, (exact - low.float()) / scale.float(), 0.0)
    codes = steps.nan_to_num(0.0, INT4_MAX, 0.0).clamp(0, INT4_MAX).round().to(torch.uint8)
    first, second = codes.chunk(2, -1)
    pairs = torch.stack((scale, low), 4 if dims == (2,) else -1)  # channels stay neighbours
    return first | second << 4, pairs.squeeze(dims[0])


def dequantize(codes: Tensor, scale: Tensor, key: bool) -> Tensor:
    """codes [N, S, H, bytes] and what `quantize_blocks` gives with them -> float32 [N, S, H, D]."""
    if scale.dim() == 2:
        return codes.view(torch.float8_e4m3fn).float() * scale[:, None, :, None]
    steps = torch.cat((codes & 15, codes >> 4), -1).float()
    step, low = scale[:, None].float().unbind(3) if key else scale[..., None, :].float().unbind(-1)
    return steps * step + low
