# SPDX-License-Identifier: Apache-2.0
"""Whole frames at even distances in time, whatever they show. A baseline.

By time and not by index: picking every n-th of the frames still held would thin out old ones geometrically.
"""

import torch
from livevlm_kernels import select_tokens

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.scoring import time_buckets
from livevlm.rope import Rope


class Uniform(Policy):
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope, clip: slice) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        num_buckets = max(1, self.budget // self.tokens_per_frame)
        buckets = time_buckets(memory, num_buckets)
        time = memory.video(memory.time)
        first, last = time.amin(-1, keepdim=True), time.amax(-1, keepdim=True)
        centre = first + (buckets + 0.5) / num_buckets * (last - first)
        scores = -(time - centre).abs().float()
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(
            scores,
            self.budget,
            scatter_ratio=1.0,
            num_buckets=num_buckets,
            bucket_capacity=self.tokens_per_frame,
            buckets=buckets,
        )
        memory.keep(indices)
