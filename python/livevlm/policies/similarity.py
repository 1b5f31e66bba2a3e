# SPDX-License-Identifier: Apache-2.0
"""Similarity-based eviction (InfiniPot-V, arXiv 2506.15745).

When the memory exceeds its budget, the newest frames stay whole. Of the older tokens, those stay whose keys look least
like the same patch in the newest frames (TaR), and those with the largest values (VaN).
"""

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope
from livevlm_kernels import evict_similar


class Similarity(Policy):
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        k, v, *facts = (memory.video(tensor) for tensor in memory.tensors)
        with memory.moving():
            evict_similar(
                k,
                v,
                memory.video(memory.slot),
                self.budget,
                num_recent_frames=self.recent // self.tokens_per_frame,
                tokens_per_frame=self.tokens_per_frame,
                alpha=self.config.alpha,
                shared=self.config.scope == "shared",
                tensors=facts,
            )
            memory.shrink(self.budget)
