# SPDX-License-Identifier: Apache-2.0
"""Questions as token ids. The model has one token a word, and a word's id is its place in ``FULL_VOCAB``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from livevlm.synthetic import ALL_KINDS, CELLS, COLOURS, FULL_VOCAB, SHAPES, TEMPLATES, Question
from livevlm.synthetic.draw import Drawn

ID = {word: index for index, word in enumerate(FULL_VOCAB)}
PREFIX = (ID["<|im_start|>"], ID["user"])
"""What stands before the video."""
SUFFIX = ("<|im_end|>", "<|im_start|>", "assistant")
NEWLINE = ID["<video>"]
"""Stands for the learned vector `image_newline`, which ends a video; a question is read together with it."""
ROWS = max(len(text.split()) for text in TEMPLATES.values()) + 2 + len(SUFFIX)
"""Rows of a question: the newline, its words, the suffix, and the answer; shorter ones are padded."""
_SLOTS = ("{shape}", "{colour}", "{cell}")


def question_ids(question: str) -> list[int]:
    """The question with the newline before it and the suffix behind it."""
    return [NEWLINE, *(ID[word] for word in (*question.split(), *SUFFIX))]


class Encoder:
    """Turns questions into ids, int64 [B, K, ROWS], with the answer where the model has to predict the end of text,
    and the row that predicts the answer, int64 [B, K]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        ids = torch.full((len(ALL_KINDS), ROWS), ID["<pad>"])
        slot = torch.full((len(ALL_KINDS), ROWS), -1)
        for kind, name in enumerate(ALL_KINDS):
            words = TEMPLATES[name].split()
            encoded = question_ids(" ".join("a" if word in _SLOTS else word for word in words))
            ids[kind, : len(encoded)] = torch.tensor(encoded)
            for place, word in enumerate(words):
                if word in _SLOTS:
                    slot[kind, 1 + place] = _SLOTS.index(word)
        length = (ids != ID["<pad>"]).sum(-1)
        self.ids, self.slot, self.answer_at = ids.to(device), slot.to(device), (length - 1).to(device)

    def drawn(self, questions: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        ids, slot = self.ids[questions.kind], self.slot[questions.kind]
        firsts = ID[SHAPES[0]], ID[COLOURS[0]], ID[CELLS[0]]
        for index, (first, value) in enumerate(
            zip(firsts, (questions.shape, questions.colour, questions.cell), strict=True)
        ):
            ids = torch.where(slot == index, (first + value)[..., None], ids)
        answer_at = self.answer_at[questions.kind]
        return ids.scatter(-1, answer_at[..., None] + 1, questions.answer[..., None]), answer_at

    def asked(self, questions: Sequence[Sequence[Question]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for questions in words: K of each of B videos."""
        rows = [[[*question_ids(q.text), ID[q.answer]] for q in video] for video in questions]
        ids = torch.tensor([[row + [ID["<pad>"]] * (ROWS - len(row)) for row in video] for video in rows])
        answer_at = torch.tensor([[len(row) - 2 for row in video] for video in rows])
        return ids.to(self.device), answer_at.to(self.device)
