# SPDX-License-Identifier: Apache-2.0
"""Discard and merge within a clip (LiveVLM v1, arXiv 2505.15269v1).

Once a clip is no longer among the newest frames, its last vision tokens score the clip's own; the best stay, and all
tokens of each frame, kept or not, are merged into one more token that stands before them. The oldest tokens leave
when the memory exceeds its budget. The paper's share of kept tokens and its kind of average are not known:
`clip_keep_ratio` and a plain mean are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.scoring import attention_scores
from livevlm.rope import Rope
from livevlm_kernels import merge_tokens, select_tokens


class ClipMerge(Policy):
    each_clip = True

    def __init__(self, config: Config, budget: int, tokens_per_frame: int) -> None:
        super().__init__(config, budget, tokens_per_frame)
        self.num_queries = config.num_score_queries

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        # The frames that were newest when the previous clip was compressed are still whole, right before this clip.
        start = max(memory.video_start, memory.video_end - self.recent)
        stop = memory.end - self.recent
        if stop > start:
            scores = attention_scores(memory, queries, rope, self.config, first_slot=start)
            self._compress_clip(memory, start, stop, scores[:, : stop - start])

    def _compress_clip(self, memory: Memory, start: int, stop: int, scores: Tensor) -> None:
        """Replaces the whole frames in slots start..stop by one merged token a frame and their best tokens."""
        layers, count, device = memory.k.shape[0], stop - start, memory.k.device
        per_frame = self.tokens_per_frame
        num_frames = count // per_frame
        kept, _ = select_tokens(scores, max(1, round(self.config.clip_keep_ratio * count)))

        frame = torch.arange(num_frames, dtype=torch.int32, device=device).repeat_interleave(per_frame)
        clip = [t[:, start:stop] for t in memory.tensors]
        k, v, size = merge_tokens(
            clip[0], clip[1], groups=frame.expand(layers, -1), num_groups=num_frames, sizes=clip[6]
        )
        first = [t[:, ::per_frame] for t in clip[2:6]]  # position, frame, slot and time of each frame's first token
        merged = [k, v, first[0], first[1], torch.full_like(first[2], -1), first[3], size]

        # Merged tokens are numbered 0..num_frames-1 and the clip's after them; sort both into stream order.
        token = torch.arange(count, device=device)
        order = torch.cat((torch.arange(num_frames, device=device) * (per_frame + 1), token + token // per_frame + 1))
        chosen = torch.cat(
            (torch.arange(num_frames, device=device).expand(layers, -1), kept.long() + num_frames), dim=1
        )
        chosen = chosen.gather(1, order[chosen].argsort(1))
        row = torch.arange(layers, device=device)[:, None]
        parts = [torch.cat((a, b), dim=1)[row, chosen] for a, b in zip(merged, clip, strict=True)]
        newest = [t[:, stop : memory.end] for t in memory.tensors]
        # First in, first out: what exceeds the budget leaves at the old end, in the same rewrite.
        held = start - memory.video_start
        excess = held + chosen.shape[1] + self.recent - self.budget
        begin, oldest = (start, start) if excess <= 0 else (memory.video_start, memory.video_start + min(excess, held))
        old = [t[:, oldest:start] for t in memory.tensors]
        whole = [torch.cat(group, dim=1)[:, -self.budget :] for group in zip(old, parts, newest, strict=True)]
        memory.replace(begin, tuple(whole))
