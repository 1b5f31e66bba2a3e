# SPDX-License-Identifier: Apache-2.0
"""Eviction by a stand-in for the question (StreamMem).

Nobody knows what will be asked, but every question stands in the same chat: the text around it, from the end of the
video to where the assistant begins, is read after a clip, and how much it attends to each cached token decides what
stays. It is forgotten at once. From the paper: these queries, old and new tokens scored together after every clip, the
best of each layer, equally many in all.

Ours: the mean over the queries and all heads; the newest frames are never evicted, as in every policy here; that a
`LiveCache` without a `Stream`, which has no chat template, takes the text before the video instead. Left out: one more
token for each frame, merged by attention; near-duplicate frames averaged before the language model; YaRN. No code of
the authors is known, and the paper does not say which template tokens it takes.
"""

import torch

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.scoring import attention_scores
from livevlm.rope import Rope
from livevlm_kernels import select_tokens


class ProxyQuery(Policy):
    asks = True

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        if self.num_video_tokens(memory) <= self.budget:
            return
        scores = attention_scores(memory, queries, rope, self.config, first_slot=memory.base, behind=True)
        scores = scores[:, memory.num_prompt_tokens :].clone()
        scores[:, scores.shape[1] - self.recent :] = torch.inf
        indices, _ = select_tokens(scores, self.budget)
        memory.keep(indices)
