# SPDX-License-Identifier: Apache-2.0
"""Positions of kept tokens that keep their distances in time, within those that a model was trained with (ours).

A token that was kept has a place in the stream, and a place among the tokens kept. The first one tells when it was, and
grows beyond all positions that the model knows; the second does neither. Between the two lie as many tokens as were
forgotten before it: a gap. Here all gaps are made smaller by the same factor, as little as is needed: while a stream
fits, this numbers tokens by their place in it, and when far more was forgotten than fits, nearly by their order.
"""

from __future__ import annotations

import torch

from livevlm.memory import Memory

LEFT = 4096  # positions, or an eighth of all of them if that is less, for what is read after a compression


def spread(memory: Memory, num_read: int, tokens_per_frame: int, most: int) -> int:
    """Numbers the video tokens of a memory that was compressed, each layer's own.

    Args:
        num_read: tokens of prompt and video that went through the model, those of the clip being read included.
        most: positions that there are.

    Returns:
        By how many positions the end of the memory came nearer than `num_read`.
    """
    frame, slot = memory.video(memory.frame), memory.video(memory.slot)
    count, prompt = frame.shape[1], memory.num_prompt_tokens
    most_gap = max(0, num_read - prompt - count)
    room = max(0, most - min(LEFT, most // 8) - prompt - count)
    share = min(1.0, room / max(1, most_gap))
    order = torch.arange(count, device=frame.device)
    gap = frame.long() * tokens_per_frame + slot.clamp(min=0) - order
    # A merged token shares its place with the first of its frame, so that a gap may be smaller than the one before it.
    shrunk = (gap.clamp(max=most_gap).double() * share).floor().long()
    memory.video(memory.position).copy_(prompt + order + shrunk)
    return most_gap - int(most_gap * share)
