# SPDX-License-Identifier: Apache-2.0
"""Which part of the memory a question attends to.

Retrieval works per layer, on un-rotated keys, over blocks of consecutive kept video tokens. The newest frames and the
prompt are always attended to; they are no candidates.

- "mean_key": blocks of `block_size` tokens, the best `retrieval_ratio` of them (LiveVLM v2, Page-based Retrieval).
- "frame": blocks of one frame's number of tokens, the best `num_retrieved_frames` (ReKV).
"""

from __future__ import annotations

import math

from torch import Tensor

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm_kernels import retrieve_blocks, summarize_blocks


class Retrieval:
    """Selects blocks of one memory; keeps their representatives until the memory changes."""

    def __init__(self, config: Config, tokens_per_frame: int) -> None:
        self.config = config
        self.block_size = tokens_per_frame if config.retrieval == "frame" else config.block_size
        self.tokens_per_frame = tokens_per_frame
        self._summaries: Tensor | None = None

    def memory_changed(self) -> None:
        self._summaries = None

    def num_candidates(self, memory: Memory) -> int:
        """Blocks that may be left out: whole ones that hold no token of the newest frames."""
        recent = self.config.recent_frames * self.tokens_per_frame
        return max(0, memory.num_video_tokens - recent) // self.block_size

    def num_selected(self, memory: Memory) -> int:
        candidates = self.num_candidates(memory)
        if self.config.retrieval == "frame":
            return min(candidates, self.config.num_retrieved_frames)
        return min(candidates, math.ceil(self.config.retrieval_ratio * candidates))

    def is_needed(self, memory: Memory) -> bool:
        return self.config.retrieval != "none" and self.num_selected(memory) < self.num_candidates(memory)

    def select(self, memory: Memory, layer: int, q: Tensor) -> Tensor:
        """The retrieved blocks of one layer, in time order, counted from `video_start`.

        Args:
            q: un-rotated queries of the question, `[num_queries, num_qo_heads, head_dim]`.

        Returns:
            int32 `[num_selected]`.
        """
        candidates = self.num_candidates(memory)
        if self._summaries is None:
            end = memory.video_start + candidates * self.block_size
            keys = memory.k[:, memory.video_start : end]
            self._summaries = summarize_blocks(keys, block_size=self.block_size)
        table, _ = retrieve_blocks(
            q,
            self._summaries[layer],
            kind="mean",
            pooling=self.config.pooling,
            num_selected=self.num_selected(memory),
        )
        return table
