# SPDX-License-Identifier: Apache-2.0
"""Draw questions about a batch of videos, as indices: on any device, and without waiting for it.

:mod:`livevlm.synthetic.questions` puts those of one video into words; training uses them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from livevlm.synthetic.events import Events
from livevlm.synthetic.new_kinds import NUM_PAIRS, Row, count, motion, word_ids
from livevlm.synthetic.vocabulary import (
    ALL_KINDS,
    CELLS,
    COLOURS,
    KINDS,
    SHAPES,
    TOKENS_PER_FRAME,
)

RECENT = 8
"""An emptied cell is asked about most often when an object was there in the last this many frames."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """K questions about each of B videos; all int64 [B, K]."""

    kind: torch.Tensor
    """Index into ``ALL_KINDS``."""
    shape: torch.Tensor
    """Index into ``SHAPES`` of the shape named in the question, if its template names one; so the next two."""
    colour: torch.Tensor
    cell: torch.Tensor
    answer: torch.Tensor
    """Index into ``FULL_VOCAB``."""
    evidence: torch.Tensor
    """``Question.evidence_frame``, where -1 stands for None."""


@lru_cache(maxsize=32)
def _allowed(kinds: tuple[str, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([kind in kinds for kind in ALL_KINDS], device=device)


class Draw:
    """What is known when each of K questions is asked about each of B videos with N events.

    asked: int64 [K], how many frames have been seen at each question, the same in all videos.
    kinds: the kinds to draw from.
    weights: float32 [10], how often each of ``ALL_KINDS`` is drawn; None draws those of ``kinds`` alike.
    """

    def __init__(
        self,
        events: Events,
        asked: torch.Tensor,
        rng: torch.Generator,
        kinds: Sequence[str],
        weights: torch.Tensor | None = None,
    ) -> None:
        self.events, self.asked, self.rng, self.kinds = events, asked, rng, tuple(kinds)
        self.device = asked.device
        (self.b, self.n), self.k = events.shape.shape, len(asked)
        self.allowed = _allowed(self.kinds, self.device)
        self.weights = self.allowed.float() if weights is None else weights * self.allowed
        first = events.first_visible()
        self.seen = first[..., None] < asked  # [B, N, K], as `last`, `last_cell` and `only_...`
        self.last = events.last_visible(asked)
        self.last_cell = events.at_age(events.cell, self.last - events.start[..., None])
        self.pair = events.shape * len(COLOURS) + events.colour
        self.shape_counts = self._counts(events.shape, len(SHAPES))  # [B, size, K]
        self.colour_counts = self._counts(events.colour, len(COLOURS))
        self.pair_counts = self._counts(self.pair, NUM_PAIRS)
        self.only_shape = self._only(self.shape_counts, events.shape)
        self.only_colour = self._only(self.colour_counts, events.colour)
        self.only_pair = self._only(self.pair_counts, self.pair)
        # Order of first appearance: what has been seen comes first, so one order serves all questions.
        self.order = first.argsort(1)
        self.rank = self.order.argsort(1)
        never = torch.full((self.b, NUM_PAIRS, self.k), -1, device=self.device)
        self.pair_last = never.scatter_reduce(1, self._each(self.pair), self.last, "amax")

    # ---------------------------------------------------------------- helpers
    def uniform(self, *size: int) -> torch.Tensor:
        return torch.rand(*size, generator=self.rng, device=self.device)

    def integer(self, high: int) -> torch.Tensor:
        return torch.randint(0, high, (self.b, self.k), generator=self.rng, device=self.device)

    def pick(self, eligible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a random eligible event for each question, and whether there is one; both [B, K]."""
        return (self.uniform(self.b, self.n, self.k) * eligible).argmax(1), eligible.any(1)

    def _each(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat [B, N] for every question: [B, N, K]."""
        return values[..., None].expand(self.b, self.n, self.k)

    def _counts(self, index: torch.Tensor, size: int) -> torch.Tensor:
        is_it = index[..., None] == torch.arange(size, device=self.device)
        return torch.einsum("bns,bnk->bsk", is_it.float(), self.seen.float()).long()

    def _only(self, counts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.seen & (counts.gather(1, self._each(index)) == 1)

    @staticmethod
    def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Look up [B, anything, K] at [B, K]."""
        return values.gather(1, index[:, None])[:, 0]

    # ---------------------------------------------------------------- drawing
    def draw(self) -> tuple[Drawn, torch.Tensor]:
        """Return the questions, and whether any of the kinds can be asked, bool [B, K]."""
        shape, colour = self.events.shape, self.events.colour
        kind = torch.multinomial(self.weights, self.b * self.k, replacement=True, generator=self.rng)
        rank = self._each(self.rank)
        before, can_before = self.pick(self.only_shape & (rank > 0))
        after, can_after = self.pick(self.only_shape & (rank + 1 < self.seen.sum(1, keepdim=True)))
        by_shape, can_by_shape = self.pick(self.only_shape)
        by_colour, can_by_colour = self.pick(self.only_colour)
        by_pair, can_by_pair = self.pick(self.only_pair)
        any_seen, can_any = self.pick(self.seen)
        present = KINDS.index("now_shape") + self.integer(2)
        cell = self._cell()
        exist_pair = self._exist_pair(any_seen, can_any)

        zero = torch.zeros_like(before)
        never, always = zero - 1, zero == 0
        previous = self.order.gather(1, (self.rank.gather(1, before) - 1).clamp(min=0))
        following = self.order.gather(1, (self.rank.gather(1, after) + 1).clamp(max=self.n - 1))
        occupant = self.events.occupant[:, self.asked - 1].gather(2, cell[..., None])[..., 0]
        shown = occupant.clamp(min=0)
        first_shape, first_colour, first_cell, nothing, yes, no = word_ids(
            (SHAPES[0], COLOURS[0], CELLS[0], "nothing", "yes", "no"), self.device
        )
        exist_last = self.at(self.pair_last, exist_pair)

        def last(event: torch.Tensor) -> torch.Tensor:
            return self.at(self.last, event)

        # One row a kind: can it be asked, shape and colour it names, answer, evidence.
        rows: list[Row] = [
            (can_by_shape, shape.gather(1, by_shape), zero, first_colour + colour.gather(1, by_shape), last(by_shape)),
            (can_by_colour, zero, colour.gather(1, by_colour), first_shape + shape.gather(1, by_colour),
             last(by_colour)),
            (can_by_pair, shape.gather(1, by_pair), colour.gather(1, by_pair),
             first_cell + self.at(self.last_cell, by_pair), last(by_pair)),
            (always, zero, zero, torch.where(occupant < 0, nothing, first_shape + shape.gather(1, shown)), never),
            (always, zero, zero, torch.where(occupant < 0, nothing, first_colour + colour.gather(1, shown)), never),
            (always, exist_pair // len(COLOURS), exist_pair % len(COLOURS), torch.where(exist_last < 0, no, yes),
             exist_last),
            (can_before, shape.gather(1, before), zero, first_shape + shape.gather(1, previous),
             torch.minimum(last(before), last(previous))),
            (can_after, shape.gather(1, after), zero, first_shape + shape.gather(1, following),
             torch.minimum(last(after), last(following))),
        ]  # fmt: skip
        unasked = (zero > 0, zero, zero, zero, never)
        rows.append(count(self) if "count" in self.kinds else unasked)
        rows.append(motion(self) if "motion" in self.kinds else unasked)

        can, shapes, colours, answers, evidence = (torch.stack(column, -1) for column in zip(*rows, strict=True))
        possible = can & self.allowed
        kind = self._replace_impossible(kind.view(self.b, self.k), possible, present)[..., None]
        chosen = (column.gather(2, kind)[..., 0] for column in (shapes, colours, answers, evidence))
        named_shape, named_colour, answer, last_frame = chosen
        return Drawn(kind[..., 0], named_shape, named_colour, cell, answer, last_frame), possible.any(-1)

    def _replace_impossible(self, kind: torch.Tensor, possible: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        first_now = KINDS.index("now_shape")
        preference = torch.arange(len(ALL_KINDS), device=self.device)
        preference = 1 + ((preference == first_now) | (preference == first_now + 1)).long()
        substitute = (possible * preference).argmax(-1)
        substitute = torch.where(possible.gather(2, present[..., None])[..., 0], present, substitute)
        return torch.where(possible.gather(2, kind[..., None])[..., 0], kind, substitute)

    def _cell(self) -> torch.Tensor:
        """Draw the cell [B, K] of a "now" question: mostly an occupied one, or one that was left just now."""
        occupied = self.events.occupant[:, self.asked - 1] >= 0  # [B, K, 16]
        full = (self.uniform(self.b, self.k, TOKENS_PER_FRAME) * occupied).argmax(-1)
        recently = (self.last >= self.asked - RECENT) & self.seen
        left = self.at(self.last_cell, (self.uniform(self.b, self.n, self.k) * recently).argmax(1))
        u = self.uniform(self.b, self.k)
        anywhere = self.integer(TOKENS_PER_FRAME)
        return torch.where((u < 0.65) & occupied.any(-1), full, torch.where(u < 0.88, left, anywhere))

    def likely(self) -> torch.Tensor:
        """Weight [B, 64, K] of pairs that were not seen: high if both shape and colour were, but not together."""
        both = (self.shape_counts[:, :, None] > 0) & (self.colour_counts[:, None] > 0)
        return 0.3 + 0.7 * both.flatten(1, 2)

    def _exist_pair(self, any_seen: torch.Tensor, can_any: torch.Tensor) -> torch.Tensor:
        """Draw the pair [B, K] of an "exist" question: half of them seen, half not."""
        weight = self.likely() * (self.pair_counts == 0)
        unseen = (self.uniform(self.b, NUM_PAIRS, self.k) * weight).argmax(1)
        positive = (self.uniform(self.b, self.k) < 0.5) & can_any | (self.pair_counts > 0).all(1)
        return torch.where(positive, self.pair.gather(1, any_seen), unseen)
