# SPDX-License-Identifier: Apache-2.0
"""The language models and the amounts of video that the ops are measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """What the KV cache of a LLaVA-OneVision looks like, and how much of it a stream keeps."""

    name: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_frame: int = 196
    budget: int = 12_000  # tokens that are kept

    def clip(self, num_frames: int) -> int:
        return num_frames * self.tokens_per_frame

    @property
    def full(self) -> int:
        """Tokens of a full memory at which a clip of 32 frames has just arrived."""
        return self.budget + self.clip(32)

    def kv(self, num_tokens: int, device: str) -> Tensor:
        """Random keys, or values, of all layers."""
        shape = (self.num_layers, num_tokens, self.num_kv_heads, self.head_dim)
        return torch.randn(shape, device=device, dtype=DTYPE)

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of the keys, or of the values, of all layers."""
        return DTYPE.itemsize * self.num_layers * num_tokens * self.num_kv_heads * self.head_dim

    def text(self, num_tokens: int) -> str:
        return f"{self.name} {self.num_layers}x{num_tokens}x{self.num_kv_heads}x{self.head_dim}"

    def slots(self, num_tokens: int, device: str) -> Tensor:
        """Patch slot of each token, int32; the last token is the last of a frame."""
        slot = torch.arange(-num_tokens, 0, dtype=torch.int32, device=device) % self.tokens_per_frame
        return slot.repeat(self.num_layers, 1)


def models(device: str) -> list[Model]:
    """7B and 0.5B; for a CPU a small one."""
    if device == "cuda":
        return [Model("7B", 28, 28, 4, 128), Model("0.5B", 24, 14, 2, 64)]
    return [Model("small", 2, 14, 2, 64, tokens_per_frame=16, budget=640)]


def random_subset(rows: int, total: int, count: int, device: str) -> Tensor:
    """`count` sorted indices below `total` in each row, int32."""
    return torch.rand(rows, total, device=device).topk(count).indices.sort(-1).values.int()


def rope_table(num_positions: int, head_dim: int, device: str) -> Tensor:
    """Cosines, then sines, of Qwen2's rotary embedding, float32 `[num_positions, head_dim]`."""
    frequency = 1e6 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(num_positions, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)
