# SPDX-License-Identifier: Apache-2.0
"""Keeps what is new at its place in the picture (ours).

When the memory exceeds its budget, the newest frames stay whole, and of all older tokens those stay that are new in two
ways: their values are far from the mean that their patch slot has had over the whole stream, and far from those of the
token that was kept in that slot before them. The first keeps things apart from their background, the second takes a
thing once for as long as it stays. Both are distances in units of the layer's mean distance to the mean; the smaller
one counts.

All tokens are scored anew each time, with the mean as it is then: what was new when it came may have turned out to be
the background, and a token's chance does not depend on when it came, as it does where every clip has its share.
`scope="shared"` is what it is made for: single layers see less.

The state beside the memory is one value for each slot, layer and KV head, in float32.
"""

from __future__ import annotations

import torch

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.history import previous_in_slot
from livevlm.rope import Rope
from livevlm_kernels import score_novelty, select_tokens

LEAST_CHANGE = 1e-3  # of the length of usual values: changes below it are not made larger to count like other layers'


class Novelty(Policy):
    wants_history = True

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        assert queries.history is not None
        slots = memory.video(memory.slot)
        usual = queries.history.mean()
        change, step = score_novelty(memory.video(memory.v), usual, slots, previous_in_slot(slots))
        # Where nothing changes, as in the first layer while a picture stands still, what is left is rounding, or 0.
        least = LEAST_CHANGE * usual.flatten(2).norm(dim=-1).mean(1, keepdim=True)
        unit = change.mean(1, keepdim=True).maximum(least).clamp(min=torch.finfo(torch.float32).tiny)
        scores = torch.stack((change / unit, step / unit))
        if self.config.scope == "shared":
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        novelty = scores.amin(0)
        novelty[:, novelty.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(novelty, self.budget, scatter_ratio=0.0)
        memory.keep(indices)
