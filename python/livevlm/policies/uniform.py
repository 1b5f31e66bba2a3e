# SPDX-License-Identifier: Apache-2.0
"""Whole frames at even distances in time, whatever they show. A baseline.

How long the stream will be is not known, so the distance doubles as it goes on: a frame's rank is the largest power of
two that divides its index, frames of the lowest rank leave first, and of equal ranks the older ones. What is kept is
every 2^n-th frame of the whole stream, and every 2^(n-1)-th of its newer part. (Picking every n-th of the frames still
held, again and again, would thin out old ones geometrically.)
"""

import torch

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope
from livevlm_kernels import select_tokens


class Uniform(Policy):
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        frame = memory.video(memory.frame)
        power = frame & -frame  # lowest set bit
        rank = torch.where(frame == 0, 31.0, power.clamp(min=1).float().log2())
        scores = rank + frame.float() / (frame.amax() + 1)
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(scores, self.budget)
        memory.keep(indices)
