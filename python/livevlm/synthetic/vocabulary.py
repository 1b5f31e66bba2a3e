# SPDX-License-Identifier: Apache-2.0
"""The words, question kinds and sizes of the synthetic benchmark.

The order of every tuple here is part of the checkpoint's contract: ``VOCAB[i]`` is the word of token id
``i``, and the position of a shape, colour or cell in its tuple is the index used by the generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "bar")
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
CELLS: tuple[str, ...] = tuple(row + column for row in "abcd" for column in "1234")
"""The 16 grid cells, row letter then column digit, in raster order (``a1`` is the top left)."""

SPECIAL: tuple[str, ...] = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
WORDS: tuple[str, ...] = (
    "system", "user", "assistant", "what", "where", "did", "was", "is", "at", "the", "a", "one", "now",
    "came", "before", "after", "appear", "shape", "colour", "?", "yes", "no", "nothing",
)  # fmt: skip
VOCAB: tuple[str, ...] = SPECIAL + WORDS + SHAPES + COLOURS + CELLS
"""Every word the embedded checkpoint's tokenizer knows, in the order of the token ids."""

COUNTS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down", "still")
NEW_WORDS: tuple[str, ...] = (
    "how",
    "many",
    "times",
    "which",
    "way",
    "move",
    "zero",
    "two",
    "three",
    "four",
    *DIRECTIONS,
)
FULL_VOCAB: tuple[str, ...] = VOCAB + NEW_WORDS
"""The words of all kinds of questions: ``VOCAB`` with its ids, and what ``NEW_KINDS`` need beyond it."""

FRAME_SIZE = 112
"""Height and width of a frame in pixels."""
GRID = 4
"""Cells along each side of a frame."""
CELL_SIZE = FRAME_SIZE // GRID
"""Height and width of one cell in pixels."""
TOKENS_PER_FRAME = GRID * GRID
"""Visual tokens of a frame after pooling: one for each cell."""

KINDS: tuple[str, ...] = (
    "recall_colour", "recall_shape", "where", "now_shape", "now_colour", "exist", "before", "after",
)  # fmt: skip
"""The kinds the embedded checkpoint was trained on, and the default everywhere."""
NEW_KINDS: tuple[str, ...] = ("count", "motion")
"""Kinds that must be asked for, of a checkpoint that knows ``FULL_VOCAB``."""
ALL_KINDS: tuple[str, ...] = KINDS + NEW_KINDS

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "recall_colour": "what colour was the {shape} ?",
        "recall_shape": "what shape was the {colour} one ?",
        "where": "where was the {colour} {shape} ?",
        "now_shape": "what shape is at {cell} now ?",
        "now_colour": "what colour is at {cell} now ?",
        "exist": "did a {colour} {shape} appear ?",
        "before": "what shape came before the {shape} ?",
        "after": "what shape came after the {shape} ?",
        "count": "how many times did a {colour} {shape} appear ?",
        "motion": "which way did the {colour} {shape} move ?",
    }
)

ANSWERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "recall_colour": COLOURS,
        "recall_shape": SHAPES,
        "where": CELLS,
        "now_shape": (*SHAPES, "nothing"),
        "now_colour": (*COLOURS, "nothing"),
        "exist": ("yes", "no"),
        "before": SHAPES,
        "after": SHAPES,
        "count": COUNTS,
        "motion": DIRECTIONS,
    }
)
"""The possible answers of each kind of question."""

CHANCE: Mapping[str, float] = MappingProxyType({kind: 1 / len(ANSWERS[kind]) for kind in ALL_KINDS})
"""Accuracy of a uniform guess among the possible answers of each kind."""
