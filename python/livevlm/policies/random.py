# SPDX-License-Identifier: Apache-2.0
"""Tokens by lot. The baseline that says what choosing is worth.

A token's lot is a hash of its place in the stream (and of its layer, unless layers share one set), so it is drawn once
and kept. Behind the newest frames, those with the lowest lots stay: whoever left was beaten by as many as there is room
for, so the survivors are the lowest lots of all tokens that ever came, and each had the same chance (a reservoir).
Nothing but the memory is needed to go on, and the same stream gives the same tokens.
"""

import torch
from torch import Tensor

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope
from livevlm_kernels import select_tokens

_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """32 bits of each int64, well mixed and invertible: xor-shifts and an odd factor below 2**27, so none overflows."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _WORD
    return x ^ (x >> 16)


class Random(Policy):
    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        frame, slot = (memory.video(tensor).long() for tensor in (memory.frame, memory.slot))
        place = frame * self.tokens_per_frame + slot  # in the stream; positions may change
        layer = torch.arange(place.shape[0], device=place.device)[:, None]
        if self.config.scope == "shared":
            layer = torch.zeros_like(layer)
        lots = _mixed((_mixed(place & _WORD) + _mixed(layer + 1) + self.config.policy_seed * 0x9E3779B1) & _WORD)
        scores = -lots.float()  # low lots, since floats are fine there: of many tokens few have equal ones
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(scores, self.budget)
        memory.keep(indices)
