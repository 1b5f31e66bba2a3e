# SPDX-License-Identifier: Apache-2.0
"""An answer and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from livevlm.attention import Turn
from livevlm.memory import Memory


@dataclass(frozen=True)
class Evidence:
    """A frame that the answer looked at.

    Attributes:
        time: seconds since the start of the stream.
        frame: index of the frame in the stream.
        weight: largest attention of a head, over all layers but the first, that one of the frame's tokens got; 0..1.
    """

    time: float
    frame: int
    weight: float


class Answer(str):
    """The text of an answer; a `str` that also knows where it came from.

    Attributes:
        question: what was asked.
        time: seconds of stream seen when it was asked.
        evidence: frames the answer rests on, most attended to first.
        num_tokens: tokens generated.
        ttft: seconds until the first token was known.
        seconds: seconds until the answer was complete.
    """

    question: str
    time: float
    evidence: tuple[Evidence, ...]
    num_tokens: int
    ttft: float
    seconds: float


def evidence_of(turn: Turn, memory: Memory, count: int) -> tuple[Evidence, ...]:
    """The `count` frames with the strongest look-up, from the attention of the answer's first token.

    A look-up is one head of one layer giving much of its attention to one token; averages over heads and layers
    hide it.
    """
    best: dict[int, Evidence] = {}
    for layer, (slots, mass) in turn.mass.items():
        is_video = (slots >= memory.video_start) & (slots < memory.video_end)
        slots, mass = slots[is_video], mass[is_video]
        top = mass.topk(min(mass.numel(), 16 * count)).indices
        facts = torch.stack((memory.frame[layer, slots[top]].double(), memory.time[layer, slots[top]]))
        for (frame, time), weight in zip(facts.T.tolist(), mass[top].tolist(), strict=True):
            if frame not in best or best[int(frame)].weight < weight:
                best[int(frame)] = Evidence(time, int(frame), weight)
    return tuple(sorted(best.values(), key=lambda e: (-e.weight, e.time))[:count])
