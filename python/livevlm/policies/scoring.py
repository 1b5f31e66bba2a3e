# SPDX-License-Identifier: Apache-2.0
"""Scores that several policies share."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm.policies.base import QueryWindow
from livevlm.rope import Rope
from livevlm_kernels import score_tokens


def attention_scores(
    memory: Memory, queries: QueryWindow, rope: Rope, config: Config, first_slot: int, *, behind: bool = False
) -> Tensor:
    """Vision-to-vision attention: how much the newest vision tokens attend to each cached token.

    Queries and keys are rotated as they were when the clip was read (packed: by place, original: by stream position).

    Args:
        first_slot: first slot whose key takes part in the softmax; all later ones do.
        behind: the queries are those of text that follows the newest vision token.

    Returns:
        float32 `[num_layers, num_tokens]`, the same row for all layers with `scope="shared"`.
    """
    k = memory.k[:, first_slot : memory.end]
    layers, num_tokens, device = k.shape[0], k.shape[1], k.device
    q = queries.newest()
    q = q if behind else q[:, -num_tokens:]
    if config.positions == "packed":
        positions = torch.arange(first_slot, memory.end, device=device)[None] - memory.base  # the same in all layers
    else:
        positions = memory.position[:, first_slot : memory.end]
    if behind:
        at = positions[:, -1:] + torch.arange(1, q.shape[1] + 1, device=device)
    else:
        at = positions[:, num_tokens - q.shape[1] :]
    q = Rope.rotate(q, rope.angles(at, q))
    # A table row for each key, so that its size follows the memory and not the length of the stream.
    table = rope.cos_sin_cache(positions)
    row = torch.arange(table[..., 0].numel(), dtype=torch.int32, device=device).view(-1, num_tokens).expand(layers, -1)
    reduction = "shared" if config.scope == "shared" else "layer"
    scores = score_tokens(q, k, positions=row, cos_sin_cache=table.flatten(0, 1), reduction=reduction)
    return scores.expand(layers, -1) if config.scope == "shared" else scores


def time_buckets(memory: Memory, num_buckets: int) -> Tensor:
    """Bucket of equal duration that each video token falls into, `[num_layers, num_video_tokens]` int32."""
    time = memory.video(memory.time)
    first, last = time.amin(-1, keepdim=True), time.amax(-1, keepdim=True)
    place = (time - first) / (last - first).clamp(min=1e-9) * num_buckets
    return place.to(torch.int32).clamp_(0, num_buckets - 1)
