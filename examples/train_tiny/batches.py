# SPDX-License-Identifier: Apache-2.0
"""Batches of videos and questions, drawn on the device that trains by the generator of `livevlm.synthetic`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from livevlm.synthetic import ALL_KINDS, COLOURS, KINDS, NEW_KINDS, SHAPES, TOKENS_PER_FRAME
from livevlm.synthetic.draw import Draw
from livevlm.synthetic.events import MAX_LIFE, NUM_VARIANTS, Events, draw_events
from livevlm.synthetic.render import render_batch
from words import Encoder

WEIGHTS = {
    "recall_colour": 1.0, "recall_shape": 1.0, "where": 1.8, "now_shape": 0.5, "now_colour": 0.5, "exist": 0.8,
    "before": 1.6, "after": 1.6, "count": 1.6, "motion": 1.0,
}  # fmt: skip
"""How often each kind is asked; the last frame alone answers the "now" kinds, order and place are the hard ones."""
PLAIN = 0.25
"""Share of batches without the events that only the new kinds need, so that both sorts of videos are known."""
AT_END = 0.4
"""Share of the questions asked at the end of the video; the others come at any moment."""
FARTHEST = 256
"""Where frames' positions have gaps, the video is spread over this many frames."""
DENSE = 0.75
"""Share of the cells with an object in the frames of the vision warm-up."""


class Shape(NamedTuple):
    """What has a CUDA graph of its own."""

    frames: int
    videos: int
    questions: int


def shape_of(num_frames: int, frames_a_step: int, questions_a_step: int) -> Shape:
    videos = max(1, min(256, frames_a_step // num_frames))
    return Shape(num_frames, videos, max(4, min(128, questions_a_step // videos)))


@dataclass(frozen=True, eq=False)
class Batch:
    """B videos of T frames with K questions each; the moments of asking are shared by the batch."""

    frames: Tensor
    """uint8 [B, T, 3, 112, 112]."""
    shapes: Tensor
    """int64 [B, T, 16]: the shape in each cell, or 8 for none; so the colours."""
    colours: Tensor
    ids: Tensor
    """int64 [B, K, ROWS], and int64 [B, K]: see `words.Encoder`; and the answer's id and the kind, int64 [B, K]."""
    answer_at: Tensor
    answer: Tensor
    kind: Tensor
    asked: Tensor
    """int64 [K]: frames seen; and int64 [T]: position of each frame; see `packed.layout`."""
    frame_start: Tensor

    def clone(self) -> Batch:
        return Batch(**{name: value.clone() for name, value in vars(self).items()})

    def copy_(self, other: Batch) -> None:
        for name, value in vars(self).items():
            value.copy_(getattr(other, name), non_blocking=True)


class Batches:
    """Draws batches. The same seed gives the same ones on the same kind of device."""

    def __init__(self, device: torch.device, seed: int, kinds: Sequence[str] = ALL_KINDS) -> None:
        self.device, self.kinds = device, tuple(kinds)
        self.rng = torch.Generator(device).manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed)  # what decides about shapes stays on the host
        self.encoder = Encoder(device)
        self.weights = torch.tensor([WEIGHTS[kind] for kind in ALL_KINDS], device=device)
        self.old_kinds = [kind for kind in kinds if kind in KINDS]

    def chance(self) -> float:
        return float(torch.rand((), generator=self.host))

    def draw(self, shape: Shape, gaps: float = 0.0) -> Batch:
        """gaps: share of the batches of short videos in which frames' positions have gaps."""
        plain = set(self.kinds) <= set(KINDS) or (bool(self.old_kinds) and self.chance() < PLAIN)
        kinds = self.old_kinds if plain else self.kinds
        repeats, walks = (kind in kinds for kind in NEW_KINDS)
        events = draw_events(shape.videos, shape.frames, self.rng, repeats=repeats, walks=walks)
        t, k = shape.frames, shape.questions
        moment = torch.randint(1, t + 1, (k,), generator=self.rng, device=self.device)
        at_end = torch.rand(k, generator=self.rng, device=self.device) < AT_END
        asked = torch.where(at_end, t, moment)
        questions, _ = Draw(events, asked, self.rng, kinds, self.weights).draw()
        ids, answer_at = self.encoder.drawn(questions)
        return Batch(
            render_batch(events, self.rng),
            *cell_labels(events),
            ids,
            answer_at,
            questions.answer,
            questions.kind,
            asked,
            self._frame_start(t, gaps),
        )

    def _frame_start(self, t: int, gaps: float) -> Tensor:
        start = torch.arange(t, device=self.device) * TOKENS_PER_FRAME
        if 4 * t > FARTHEST or self.chance() >= gaps:
            return start
        mean = self.chance() * (FARTHEST / t - 1) * TOKENS_PER_FRAME
        gap = (torch.rand(t, generator=self.rng, device=self.device) * 2 * mean).long()
        gap[0] = 0
        return start + gap.cumsum(0)

    def dense(self, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Single frames crowded with objects, uint8 [N, 3, 112, 112], and the shape and colour in each cell [N, 16]."""
        n, cells = num_frames, TOKENS_PER_FRAME

        def integer(high: int) -> Tensor:
            return torch.randint(0, high, (n, cells), generator=self.rng, device=self.device)

        here = torch.rand(n, 1, cells, generator=self.rng, device=self.device) < DENSE
        event = torch.arange(cells, device=self.device).expand(n, 1, cells)
        events = Events(
            shape=integer(len(SHAPES)),
            colour=integer(len(COLOURS)),
            start=torch.zeros_like(event[:, 0]),
            cell=event[:, 0, :, None].expand(n, cells, MAX_LIFE),
            visible=here[:, 0, :, None].expand(n, cells, MAX_LIFE),
            occupant=torch.where(here, event, -1),
            variant=integer(NUM_VARIANTS),
            tint=(torch.rand(n, cells, 3, generator=self.rng, device=self.device) - 0.5) * 0.16,
        )
        shapes, colours = cell_labels(events)
        return render_batch(events, self.rng)[:, 0], shapes[:, 0], colours[:, 0]


def cell_labels(events: Events) -> tuple[Tensor, Tensor]:
    """Shape and colour in each cell of each frame, int64 [B, T, 16]; 8 where there is no object."""
    occupant = events.occupant.flatten(1)
    event = occupant.clamp(min=0)
    shapes = torch.where(occupant >= 0, events.shape.gather(1, event), len(SHAPES))
    colours = torch.where(occupant >= 0, events.colour.gather(1, event), len(COLOURS))
    return shapes.view_as(events.occupant), colours.view_as(events.occupant)
