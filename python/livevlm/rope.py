# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings applied when keys are read, not when they are written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROWTH = 16_384  # rows that a table of angles has at least


class IdentityRope(nn.Module):
    """Stands in for a language model's `rotary_emb` while a LiveCache is in use: rotates by nothing.

    Qwen2Attention rotates keys before it hands them to the cache; with cos = 1 and sin = 0 they arrive un-rotated.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        shape = (*position_ids.shape[-2:], self.head_dim)
        return x.new_ones(shape), x.new_zeros(shape)


class Rope:
    """The model's own rotary embedding, for queries and keys laid out `[tokens, heads, head_dim]`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._table: Tensor | None = None
        self._outgrown: list[Tensor] = []  # CUDA graphs may still read them

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each `positions.shape + [head_dim]`, in the dtype of `like`."""
        cos, sin = self.module(like, positions.reshape(1, -1).long())
        return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)

    @staticmethod
    def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """`x` `[..., tokens, heads, head_dim]` rotated by angles `[..., tokens, head_dim]`, as transformers does it."""
        cos, sin = angles[0].unsqueeze(-2), angles[1].unsqueeze(-2)
        first, second = x.chunk(2, dim=-1)
        return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)

    def table(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Angles of the positions from 0 on, at least `num_positions` of them; kept, and grown by doubling.

        In half precision for 16-bit models: that halves what attention has to read for it, and is finer than the
        bfloat16 angles that stock transformers uses.
        """
        wanted = torch.float32 if dtype == torch.float32 else torch.float16
        table = self._table
        if table is None or table.shape[0] < num_positions or table.dtype != wanted or table.device != device:
            size = 1 << max(num_positions - 1, GROWTH - 1).bit_length()
            self._outgrown += [] if table is None else [table]
            table = self.cos_sin_cache(torch.arange(size, device=device)).to(wanted)
            self._table = table
        return table

    def cos_sin_cache(self, positions: Tensor) -> Tensor:
        """The table the kernels take: cos then sin of each position, `positions.shape + [head_dim]` float32."""
        cos, sin = self.angles(positions, torch.empty(0, dtype=torch.float32, device=positions.device))
        half = cos.shape[-1] // 2
        return torch.cat((cos[..., :half], sin[..., :half]), dim=-1)
