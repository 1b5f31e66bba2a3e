# SPDX-License-Identifier: Apache-2.0
"""The kinds of questions the embedded checkpoint does not know: how often, and which way."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from livevlm.synthetic.vocabulary import COLOURS, COUNTS, DIRECTIONS, FULL_VOCAB, GRID, SHAPES, TOKENS_PER_FRAME

if TYPE_CHECKING:
    from livevlm.synthetic.draw import Draw

NUM_PAIRS = len(SHAPES) * len(COLOURS)
"""Pairs of a shape and a colour; a pair's number is ``shape * len(COLOURS) + colour``."""

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of one kind, all [B, K]: whether it can be asked, shape and colour it names, answer, evidence; see ``Drawn``."""


@lru_cache(maxsize=32)
def word_ids(words: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """Return int64 [len(words)]: the index of each word in ``FULL_VOCAB``.  It is shared: do not write to it."""
    return torch.tensor([FULL_VOCAB.index(word) for word in words], device=device)


def count(draw: Draw) -> Row:
    """Draw a "count" question: a pair that came 0 to 4 times, each number as likely where there is a choice.

    A pair comes whenever a frame shows it and the frame before did not.
    """
    num_frames = draw.events.occupant.shape[1]
    occupant = draw.events.occupant.flatten(1)
    shown = torch.where(occupant >= 0, draw.pair.gather(1, occupant.clamp(min=0)), NUM_PAIRS)
    there = torch.zeros(draw.b, num_frames, NUM_PAIRS + 1, dtype=torch.bool, device=draw.device)
    there = there.scatter(2, shown.view(draw.b, num_frames, TOKENS_PER_FRAME), True)[..., :NUM_PAIRS]
    comes = there & ~F.pad(there, (0, 0, 1, 0))[:, :-1]
    times = comes.long().cumsum(1)[:, draw.asked - 1].transpose(1, 2)  # [B, 64, K]
    likely = torch.where(times == 0, draw.likely(), 1.0)
    otherwise = 1e-5 * 10.0 ** times.clamp(max=len(COUNTS))  # most pairs never came, most others came once
    weight = torch.where(times == draw.integer(len(COUNTS))[:, None], 1.0, otherwise) * likely
    weight = weight * (times < len(COUNTS))
    pair = (draw.uniform(draw.b, NUM_PAIRS, draw.k) * weight).argmax(1)
    can = (times < len(COUNTS)).any(1)
    answer = word_ids(COUNTS, draw.device)[draw.at(times, pair).clamp(max=len(COUNTS) - 1)]
    return can, pair // len(COLOURS), pair % len(COLOURS), answer, draw.at(draw.pair_last, pair)


def motion(draw: Draw) -> Row:
    """Draw a "motion" question: from the first to the last cell where the only object of its pair was seen.

    It was seen in two frames at least, and each direction is as likely where there is a choice.
    """
    events = draw.events
    row = draw.last_cell // GRID - events.cell[..., :1] // GRID  # [B, N, K]; an object shows from its start
    column = draw.last_cell % GRID - events.cell[..., :1] % GRID
    sideways = torch.where(column < 0, 0, 1)
    upright = torch.where(row < 0, 2, torch.where(row > 0, 3, 4))
    direction = torch.where(column != 0, sideways, upright)  # index into DIRECTIONS
    twice = events.at_age(events.visible.long().cumsum(-1), events.ages(draw.asked)) >= 2
    eligible = draw.only_pair & twice
    still = len(DIRECTIONS) - 1
    otherwise = torch.where(direction == still, 1e-4, 0.01)
    wanted = torch.where(direction == draw.integer(len(DIRECTIONS))[:, None], 1.0, otherwise)
    event = (draw.uniform(draw.b, draw.n, draw.k) * eligible * wanted).argmax(1)
    answer = word_ids(DIRECTIONS, draw.device)[draw.at(direction, event)]
    shape, colour = events.shape.gather(1, event), events.colour.gather(1, event)
    return eligible.any(1), shape, colour, answer, draw.at(draw.last, event)
