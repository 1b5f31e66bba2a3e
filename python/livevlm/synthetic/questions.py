# SPDX-License-Identifier: Apache-2.0
"""Questions about a synthetic video, with the true answer at the moment each one is asked.

A question asked after K frames is answered from those K frames alone.  The named object is always
unambiguous: "the star" is asked about only while one star has been seen so far, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from livevlm.synthetic.events import MAX_LIFE, Events
from livevlm.synthetic.vocabulary import CELLS, COLOURS, KINDS, SHAPES, TEMPLATES, TOKENS_PER_FRAME

RECENT = 8
"""An emptied cell is asked about most often when an object was there in the last this many frames."""


@dataclass(frozen=True)
class Question:
    """One question and its true answer."""

    text: str
    """Such as ``"what colour was the star ?"``; words are separated by single spaces."""
    answer: str
    """One word, one of ``ANSWERS[kind]``."""
    kind: str
    """One of ``KINDS``."""
    frame: int
    """Number of frames seen when it is asked: the evidence lies in frames 0 to ``frame - 1``."""
    evidence_frame: int | None
    """Index of the last frame the answer can be read from; None if the answer is about the present or "no".

    For "before" and "after", which need two objects, it is the frame where the first of them was last seen.
    """


def draw_questions(
    events: Events, frames_seen: Sequence[int], kinds: Sequence[str], rng: torch.Generator
) -> list[Question]:
    """Draw one question for each entry of ``frames_seen``, about one video.

    Kinds are drawn uniformly from ``kinds``.  A kind no question of which can be asked yet (such as "before"
    after a single object) is replaced by a "now" question, which can always be asked, if ``kinds`` has one;
    otherwise by another of ``kinds``.

    Raises ValueError if no question of any of ``kinds`` can be asked at some entry of ``frames_seen``.
    """
    return _Draw(events, torch.tensor(list(frames_seen)), rng).questions(kinds)


class _Draw:
    """What is known when each of K questions is asked about a video with N events."""

    def __init__(self, events: Events, asked: torch.Tensor, rng: torch.Generator) -> None:
        self.events, self.asked, self.rng = events, asked, rng
        self.n, self.k = len(events.shape), len(asked)
        self.seen = events.first_visible()[:, None] < asked  # [N, K], as all the others below
        self.last = events.last_visible(asked)
        self.pair = events.shape * len(COLOURS) + events.colour
        self.shape_counts, self.colour_counts, self.pair_counts = (
            (F.one_hot(index, size).float().T @ self.seen.float()).long()  # [size, K]
            for index, size in (
                (events.shape, len(SHAPES)),
                (events.colour, len(COLOURS)),
                (self.pair, len(SHAPES) * len(COLOURS)),
            )
        )
        self.only_shape = self.seen & (self.shape_counts[events.shape] == 1)
        self.only_colour = self.seen & (self.colour_counts[events.colour] == 1)
        self.only_pair = self.seen & (self.pair_counts[self.pair] == 1)
        # Order of first appearance among the events seen so far; the others come last.
        onset = torch.where(self.seen, events.first_visible()[:, None], torch.iinfo(torch.long).max)
        self.order = onset.argsort(0)
        self.rank = self.order.argsort(0)

    def uniform(self, *size: int) -> torch.Tensor:
        return torch.rand(*size, generator=self.rng)

    def integer(self, high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=self.rng)

    def pick(self, eligible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a random eligible event for each question, and whether there is one; both [K]."""
        return (self.uniform(self.n, self.k) * eligible).argmax(0), eligible.any(0)

    def questions(self, kinds: Sequence[str]) -> list[Question]:
        allowed = torch.tensor([kind in kinds for kind in KINDS])
        kind = torch.multinomial(allowed.float(), self.k, replacement=True, generator=self.rng)
        before, can_before = self.pick(self.only_shape & (self.rank > 0))
        after, can_after = self.pick(self.only_shape & (self.rank + 1 < self.seen.sum(0)))
        by_shape, can_by_shape = self.pick(self.only_shape)
        by_colour, can_by_colour = self.pick(self.only_colour)
        by_pair, can_by_pair = self.pick(self.only_pair)
        any_seen, can_any = self.pick(self.seen)
        always = torch.ones_like(can_any)
        can = torch.stack(
            [can_by_shape, can_by_colour, can_by_pair, always, always, always, can_before, can_after], 1
        )  # [K, 8], in the order of KINDS
        present = KINDS.index("now_shape") + self.integer(2, self.k)
        cell = self._cell()
        exist_pair = self._exist_pair(any_seen, can_any)
        kind = self._replace_impossible(kind, can, allowed, present)
        named = {
            "recall_colour": by_shape, "recall_shape": by_colour, "where": by_pair,
            "before": before, "after": after,
        }  # fmt: skip
        return [
            self._ask(KINDS[int(kind[i])], i, {name: int(event[i]) for name, event in named.items()},
                      int(cell[i]), int(exist_pair[i]))
            for i in range(self.k)
        ]  # fmt: skip

    def _replace_impossible(
        self, kind: torch.Tensor, can: torch.Tensor, allowed: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        possible = can & allowed
        if not possible.any(1).all():
            names = [name for name, is_allowed in zip(KINDS, allowed.tolist(), strict=True) if is_allowed]
            first = int(self.asked[(~possible.any(1)).nonzero()[0, 0]])
            raise ValueError(
                f"kinds={names}: no question of these kinds can be asked after {first} frames of this video; "
                "ask later, or allow more kinds ('now_shape', 'now_colour' and 'exist' can always be asked)"
            )
        preference = torch.tensor([1 + kind_name.startswith("now_") for kind_name in KINDS])
        substitute = (possible * preference).argmax(1)
        substitute = torch.where(possible.gather(1, present[:, None])[:, 0], present, substitute)
        return torch.where(can.gather(1, kind[:, None])[:, 0], kind, substitute)

    def _cell(self) -> torch.Tensor:
        """Draw the cell [K] of a "now" question: mostly an occupied one, or one that was left just now."""
        occupied = self.events.occupant[self.asked - 1] >= 0  # [K, 16]
        full = (self.uniform(self.k, TOKENS_PER_FRAME) * occupied).argmax(-1)
        recent = (self.uniform(self.n, self.k) * (self.last >= self.asked - RECENT) * self.seen).argmax(0)
        u = self.uniform(self.k)
        left = self._last_cell(recent, torch.arange(self.k))
        anywhere = self.integer(TOKENS_PER_FRAME, self.k)
        return torch.where((u < 0.65) & occupied.any(-1), full, torch.where(u < 0.88, left, anywhere))

    def _exist_pair(self, any_seen: torch.Tensor, can_any: torch.Tensor) -> torch.Tensor:
        """Draw the shape and colour [K] of an "exist" question: half of them seen, half not.

        The unseen ones are mostly a shape and a colour that have both been seen, but never together.
        """
        both = (self.shape_counts[:, None] > 0) & (self.colour_counts[None] > 0)
        weight = (0.3 + 0.7 * both.flatten(0, 1)) * (self.pair_counts == 0)
        unseen = (self.uniform(len(self.pair_counts), self.k) * weight).argmax(0)
        positive = (self.uniform(self.k) < 0.5) & can_any | (self.pair_counts > 0).all(0)
        return torch.where(positive, self.pair[any_seen], unseen)

    def _last_cell(self, event: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Return the cell where each event was last seen before the question; any cell if it never was."""
        age = self.last[event, question] - self.events.start[event]
        cell: torch.Tensor = self.events.cell[event, age.clamp(0, MAX_LIFE - 1)]
        return cell

    def _ask(self, kind: str, i: int, named: dict[str, int], cell: int, exist_pair: int) -> Question:
        """Put question ``i`` into words, with its answer and evidence."""
        evidence: int | None = None
        if kind in named:
            event = named[kind]
            shape, colour = SHAPES[int(self.events.shape[event])], COLOURS[int(self.events.colour[event])]
            evidence = int(self.last[event, i])
            if kind in ("before", "after"):
                other = int(self.order[self.rank[event, i] + (-1 if kind == "before" else 1), i])
                answer = SHAPES[int(self.events.shape[other])]
                evidence = min(evidence, int(self.last[other, i]))
            else:
                where = self._last_cell(torch.tensor(event), torch.tensor(i))
                answer = {"recall_colour": colour, "recall_shape": shape, "where": CELLS[int(where)]}[kind]
        else:
            shape, colour = SHAPES[exist_pair // len(COLOURS)], COLOURS[exist_pair % len(COLOURS)]
            occupant = int(self.events.occupant[int(self.asked[i]) - 1, cell])
            if kind == "exist":
                shown = self.last[self.pair == exist_pair, i].tolist()
                evidence = max((frame for frame in shown if frame >= 0), default=None)
                answer = "no" if evidence is None else "yes"
            elif occupant < 0:
                answer = "nothing"
            elif kind == "now_shape":
                answer = SHAPES[int(self.events.shape[occupant])]
            else:
                answer = COLOURS[int(self.events.colour[occupant])]
        text = TEMPLATES[kind].format(shape=shape, colour=colour, cell=CELLS[cell])
        return Question(text, answer, kind, int(self.asked[i]), evidence)
