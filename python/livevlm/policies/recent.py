# SPDX-License-Identifier: Apache-2.0
"""A sliding window: the newest tokens stay. The control every other policy must beat."""

import torch

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope


class Recent(Policy):
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        count = self.num_video_tokens(memory)
        if count > self.budget:
            newest = torch.arange(count - self.budget, count, dtype=torch.int32, device=memory.k.device)
            memory.keep(newest.expand(memory.k.shape[0], -1))
