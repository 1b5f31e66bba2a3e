# SPDX-License-Identifier: Apache-2.0
"""Keeps what differs from what its place in the picture usually looks like (ours).

When the memory exceeds its budget, the newest frames stay whole, and of all older tokens those stay whose un-rotated
keys are the least like the mean key that their patch slot has had over the whole stream. All tokens are scored anew
each time, with the mean as it is then: what was new when it came may have turned out to be the background, and a
token's chance does not depend on when it came, as it does where every clip has its share. `scope="shared"` is what it
is made for: single layers see less.

The state beside the memory is one key for each slot, layer and KV head, in float32.
"""

from __future__ import annotations

import torch

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope
from livevlm_kernels import score_redundancy, select_tokens


class Novelty(Policy):
    wants_history = True

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        assert queries.history is not None
        usual = queries.history.mean().to(memory.k.dtype)[:, None]
        k, v, slots = (memory.video(tensor) for tensor in (memory.k, memory.v, memory.slot))
        likeness, _ = score_redundancy(k, v, usual, slots, per_head=False)
        if self.config.scope == "shared":
            likeness = likeness.mean(0, keepdim=True).expand_as(likeness)
        scores = -likeness
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(scores, self.budget, scatter_ratio=0.0)
        memory.keep(indices)
