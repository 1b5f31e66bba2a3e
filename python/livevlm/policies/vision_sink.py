# SPDX-License-Identifier: Apache-2.0
"""Vision Sink Bucketing (LiveVLM v2, arXiv 2505.15269v2).

When the memory exceeds its budget, the newest vision tokens score all cached ones by their attention. Part of the
budget goes to the best tokens wherever they are, the rest to the best token of each bucket along the stream, so that
some of every period survives.
"""

import torch

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.scoring import attention_scores, time_buckets
from livevlm.rope import Rope
from livevlm_kernels import select_tokens


class VisionSink(Policy):
    def __init__(self, config: Config, budget: int, tokens_per_frame: int) -> None:
        super().__init__(config, budget, tokens_per_frame)
        self.num_queries = config.num_score_queries

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        config = self.config
        scores = attention_scores(memory, queries, rope, config, first_slot=memory.base)
        scores = scores[:, memory.num_prompt_tokens :].clone()
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        num_buckets = -(-self.budget // config.bucket_capacity)
        indices, _ = select_tokens(
            scores,
            self.budget,
            scatter_ratio=config.scatter_ratio,
            num_buckets=num_buckets,
            bucket_capacity=config.bucket_capacity,
            buckets=time_buckets(memory, num_buckets) if config.bucket_by == "time" else None,
        )
        memory.keep(indices)
