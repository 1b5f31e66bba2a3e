# SPDX-License-Identifier: Apache-2.0
"""Questions about a synthetic video, with the true answer at the moment each one is asked.

A question asked after K frames is answered from those K frames alone.  The named object is always
unambiguous: "the star" is asked about only while one star has been seen so far, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from livevlm.synthetic.draw import Draw
from livevlm.synthetic.events import Events
from livevlm.synthetic.vocabulary import ALL_KINDS, CELLS, COLOURS, FULL_VOCAB, SHAPES, TEMPLATES


@dataclass(frozen=True)
class Question:
    """One question and its true answer."""

    text: str
    """Such as ``"what colour was the star ?"``; words are separated by single spaces."""
    answer: str
    """One word, one of ``ANSWERS[kind]``."""
    kind: str
    """One of ``ALL_KINDS``."""
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
    one = Events(**{name: value[None] for name, value in vars(events).items()})
    drawn, possible = Draw(one, torch.tensor(list(frames_seen)), rng, kinds).draw()
    if not possible.all():
        first = frames_seen[int((~possible[0]).nonzero()[0, 0])]
        raise ValueError(
            f"kinds={[kind for kind in ALL_KINDS if kind in kinds]}: no question of these kinds can be asked after "
            f"{first} frames of this video; ask later, or allow more kinds ('now_shape', 'now_colour' and 'exist' can "
            "always be asked)"
        )
    columns = torch.stack([value[0] for value in vars(drawn).values()], 1).tolist()
    result = []
    for seen, (kind, shape, colour, cell, answer, evidence) in zip(frames_seen, columns, strict=True):
        name = ALL_KINDS[kind]
        text = TEMPLATES[name].format(shape=SHAPES[shape], colour=COLOURS[colour], cell=CELLS[cell])
        result.append(Question(text, FULL_VOCAB[answer], name, seen, None if evidence < 0 else evidence))
    return result
