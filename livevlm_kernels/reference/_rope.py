# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding at read: the one definition that every op uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> Tensor:
    """Rotates float32 `x` [..., head_dim]; `positions` broadcasts to the shape of `x` without its last dimension.

    Half-split ("neox") rotation as in Llama and Qwen2: element i is paired with element i + head_dim / 2. A row of
    `cos_sin_cache` [max_position, head_dim] holds head_dim / 2 cosines, then as many sines. Positions outside
    0..max_position - 1 are clamped: refusing them would need a device synchronisation.
    """
    row = positions.clamp(0, cos_sin_cache.shape[0] - 1).long()
    cos, sin = cos_sin_cache[row].float().chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
