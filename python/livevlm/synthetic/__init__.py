# SPDX-License-Identifier: Apache-2.0
"""Synthetic videos with questions whose true answers are known.

Coloured shapes come and go in a 4x4 grid over a textured background.  The small checkpoint that comes with
this package was trained on these videos, so answer quality can be measured on any machine::

    from livevlm.synthetic import generate

    video = generate(64, seed=0)[0]
    video.frames                      # uint8 [64, 3, 112, 112]
    for question in video.questions(8, seed=0):
        print(question.text, "->", question.answer)
"""

from __future__ import annotations

from livevlm.synthetic.events import Events
from livevlm.synthetic.questions import Question
from livevlm.synthetic.video import SyntheticVideo, generate
from livevlm.synthetic.vocabulary import (
    ALL_KINDS,
    ANSWERS,
    CELLS,
    CHANCE,
    COLOURS,
    FRAME_SIZE,
    FULL_VOCAB,
    GRID,
    KINDS,
    NEW_KINDS,
    SHAPES,
    TEMPLATES,
    TOKENS_PER_FRAME,
    VOCAB,
)

__all__ = [
    "ALL_KINDS",
    "ANSWERS",
    "CELLS",
    "CHANCE",
    "COLOURS",
    "FRAME_SIZE",
    "FULL_VOCAB",
    "GRID",
    "KINDS",
    "NEW_KINDS",
    "SHAPES",
    "TEMPLATES",
    "TOKENS_PER_FRAME",
    "VOCAB",
    "Events",
    "Question",
    "SyntheticVideo",
    "generate",
]
