# SPDX-License-Identifier: Apache-2.0
"""What every policy is given and must do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from livevlm.config import Config
from livevlm.memory import KVShape, Memory
from livevlm.policies.history import SlotHistory
from livevlm.rope import Rope


class QueryWindow:
    """Un-rotated queries of the newest vision tokens, for policies that score the memory by their attention.

    Attributes:
        q: `[num_layers, num_queries, num_qo_heads, head_dim]`, oldest first; the newest `count` rows are filled.
        history: what all frames looked like, for policies that want to know it.
    """

    def __init__(self, shape: KVShape, num_queries: int, history: SlotHistory | None = None) -> None:
        self.history = history
        size = (shape.num_layers, num_queries, shape.num_qo_heads, shape.head_dim)
        with torch.inference_mode(False):  # they are written in place, in inference mode and outside of it
            self.q = torch.zeros(size, dtype=shape.dtype, device=shape.device)
            self._new = torch.zeros_like(self.q)  # those of a clip that is not committed yet, at the end
        self.count = self._num_new = 0

    @property
    def capacity(self) -> int:
        return self.q.shape[1]

    def observe(self, layer: int, q: Tensor) -> None:
        """Copies the newest of the queries `[num_tokens, num_qo_heads, head_dim]` of a clip; see `expect`."""
        if self.capacity:
            q = q[-self.capacity :]
            self._new[layer, self.capacity - q.shape[0] :] = q.detach()

    def expect(self, v: Tensor) -> None:
        """The queries of a clip with these values were observed, by a CUDA graph perhaps; `commit` makes them count.

        Args:
            v: of whole frames, `[num_layers, num_tokens, num_kv_heads, head_dim]`.
        """
        self._num_new = min(self.capacity, v.shape[1])
        if self.history is not None:
            self.history.observe(v)

    def rollback(self) -> None:
        self._num_new = 0
        if self.history is not None:
            self.history.rollback()

    def commit(self) -> None:
        """Takes the observed queries into `q`."""
        if self.history is not None:
            self.history.commit()
        if self._num_new:
            joined, self.count = self._with_new()
            self.q.copy_(joined)
            self._num_new = 0

    def newest(self) -> Tensor:
        """The newest queries, those of the clip being read included: `[num_layers, count, num_qo_heads, head_dim]`."""
        q, count = self._with_new()
        return q[:, self.capacity - count :]

    def _with_new(self) -> tuple[Tensor, int]:
        if not self._num_new:
            return self.q, self.count
        if self._num_new == self.capacity:
            return self._new, self.capacity
        joined = torch.cat((self.q[:, self._num_new :], self._new[:, self.capacity - self._num_new :]), dim=1)
        return joined, min(self.capacity, self.count + self._num_new)


class Policy(ABC):
    """Keeps a memory within `budget` video tokens per layer.

    Attributes:
        num_queries: newest vision queries the policy wants to see.
        most_tokens: video tokens that may be held when no clip is being read: the budget, and what may pile up.
        wants_history: `queries.history` must be there.
        each_clip: wants to see every clip by itself, so nothing piles up.
        asks: wants the queries of the text around a question, asked behind the memory, in the place of vision queries.
        unbounded: the memory grows with the stream.
    """

    unbounded = each_clip = asks = wants_history = False

    def __init__(self, config: Config, budget: int, tokens_per_frame: int) -> None:
        self.config = config
        self.budget = budget
        self.tokens_per_frame = tokens_per_frame
        self.recent = config.recent_tokens(budget, tokens_per_frame)
        self.num_queries = 0
        room = min(int(config.slack * budget), config.clip_frames * tokens_per_frame)
        self.most_tokens = budget if self.each_clip else budget + room

    @abstractmethod
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        """Leaves at most `budget` video tokens, the newest frames among them.

        Called after a clip, before it is committed: its tokens are then the provisional ones. Unless `each_clip` is
        set, also between clips, when there are none.

        Args:
            memory: what to compress; its newest video tokens are those that `queries` belong to, unless it `asks`.
            queries: see `QueryWindow`.
            rope: the model's rotary embedding.
        """

    def num_video_tokens(self, memory: Memory) -> int:
        """Video tokens held, the clip being read included."""
        return memory.end - memory.video_start
