# SPDX-License-Identifier: Apache-2.0
"""Which part of the memory a question attends to.

Retrieval works per layer, on un-rotated keys, over blocks of consecutive kept video tokens. The newest frames and the
prompt are always attended to; they are no candidates.

- "mean_key": blocks of `block_size` tokens, the best `retrieval_ratio` of them (LiveVLM v2, Page-based Retrieval).
- "frame": blocks of one frame's number of tokens, the best `num_retrieved_frames` (ReKV).
- "mass": blocks as for "mean_key", by the attention that the question really pays to their tokens: it reads all keys,
  which is affordable in a memory of bounded size (ours).

Which of the question's queries choose is `retrieval_queries`. What most of a question's tokens look at has little to do
with the answer, and drowns what the last one, which the answer is predicted from, looks at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm_kernels import retrieve_blocks, summarize_blocks


class Retrieval:
    """Selects blocks of one memory; keeps their representatives until the tokens in them move."""

    def __init__(self, config: Config, tokens_per_frame: int) -> None:
        self.config = config
        self.block_size = tokens_per_frame if config.retrieval == "frame" else config.block_size
        self.tokens_per_frame = tokens_per_frame
        self._summaries: Tensor | None = None  # of all blocks that the memory has room for
        self._of = (0, 0)  # the memory, as it was when they were made
        self._num_made = 0

    def num_candidates(self, memory: Memory) -> int:
        """Blocks that may be left out: whole ones that hold no token of the newest frames."""
        recent = self.config.recent_frames * self.tokens_per_frame
        return max(0, memory.num_video_tokens - recent) // self.block_size

    def num_selected(self, memory: Memory) -> int:
        candidates = self.num_candidates(memory)
        if self.config.retrieval == "frame":
            return min(candidates, self.config.num_retrieved_frames)
        return min(candidates, self._share_of(candidates))

    def _share_of(self, candidates: int) -> int:
        return math.ceil(self.config.retrieval_ratio * candidates - 1e-6)  # as `retrieve_blocks` counts on the device

    def is_needed(self, memory: Memory) -> bool:
        return self.config.retrieval != "none" and self.num_selected(memory) < self.num_candidates(memory)

    def select(self, memory: Memory, layer: int, q: Tensor) -> Tensor:
        """The retrieved blocks of one layer, in time order, counted from `video_start`.

        Args:
            q: un-rotated queries of the question, `[num_queries, num_qo_heads, head_dim]`; only the last one's are
                looked at, `by_last`.

        Returns:
            int32 `[num_selected]`.
        """
        q = q[-1:] if self.by_last else q
        candidates = self.num_candidates(memory)
        if self.by_mass:
            keys = self.searched(memory)[layer, : candidates * self.block_size]
        else:
            keys = self.summaries(memory)[layer, :candidates]
        table, _ = retrieve_blocks(q, keys, num_selected=self.num_selected(memory), **self._how)
        return table

    @property
    def by_mass(self) -> bool:
        return self.config.retrieval == "mass"

    @property
    def by_last(self) -> bool:
        """Whether the question's last query chooses alone."""
        queries = self.config.retrieval_queries
        if queries is None:
            return self.by_mass and self.config.retrieval_pass == "inline"
        return queries == "last"

    @property
    def _how(self) -> dict[str, Any]:
        if self.by_mass:
            return {"kind": "mass", "block_size": self.block_size}
        return {"kind": "mean", "pooling": self.config.pooling}

    def searched(self, memory: Memory) -> Tensor:
        """What is looked at to find blocks, of all layers: the keys themselves, or `buffer`."""
        if not self.by_mass:
            return self.buffer(memory)
        whole = (memory.num_slots - memory.video_start) // self.block_size * self.block_size
        return memory.k[:, memory.video_start : memory.video_start + whole]

    def num_searched(self, num_candidates: int) -> int:
        """How many entries of `searched` so many blocks are."""
        return num_candidates * self.block_size if self.by_mass else num_candidates

    def search(self, q: Tensor, searched: Tensor, num_searched: Tensor) -> Tensor:
        """`select` where the number of candidates is known on the device only.

        Args:
            q: those that choose, and none beside them: `by_last`, one. Rows of zeros choose nothing.
            searched: of one layer, as wide as the memory.
            num_searched: int32 `[1]`.

        Returns:
            int32, as many as there can be; -1 behind the last one.
        """
        most, ratio = searched.shape[0] // (self.block_size if self.by_mass else 1), None
        if self.config.retrieval == "frame":
            most = min(most, self.config.num_retrieved_frames)
        else:
            most, ratio = min(most, self._share_of(most)), self.config.retrieval_ratio
        table, _ = retrieve_blocks(q, searched, num_selected=most, ratio=ratio, seq_lens=num_searched, **self._how)
        return table

    def buffer(self, memory: Memory) -> Tensor:
        """Where the representatives of a memory of this size are kept, `[num_layers, num_blocks, ...]` float32."""
        layers, slots, *head = memory.k.shape
        shape = (layers, (slots - memory.video_start) // self.block_size, *head)
        kept = self._summaries
        if kept is None or kept.shape != shape or kept.device != memory.k.device:
            with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
                self._summaries = kept = torch.zeros(shape, dtype=torch.float32, device=memory.k.device)
            self._num_made = 0
        return kept

    def summaries(self, memory: Memory) -> Tensor:
        """The representatives of all whole blocks that may be left out, in `buffer`; made where they are not there.

        None are needed `by_mass`.
        """
        if self.by_mass:
            return self.searched(memory)
        kept, count, now = self.buffer(memory), self.num_candidates(memory), (memory.version, memory.num_moves)
        if self._of != now:
            self._of, self._num_made = now, 0
        if self._num_made < count:
            keys = memory.k[:, memory.video_start : memory.video_start + kept.shape[1] * self.block_size]
            first, valid = (
                torch.full(kept.shape[:1], blocks * self.block_size, dtype=torch.int32, device=kept.device)
                for blocks in (self._num_made, count)
            )
            summarize_blocks(keys, block_size=self.block_size, seq_lens=valid, first_token=first, out=kept)
            self._num_made = count
        return kept
