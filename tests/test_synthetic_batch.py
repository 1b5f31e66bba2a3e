# SPDX-License-Identifier: Apache-2.0
"""Videos and questions drawn by the batch, as training does; counting and motion; all answers replayed from frames."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from livevlm.synthetic import (
    ALL_KINDS,
    ANSWERS,
    CELLS,
    COLOURS,
    FULL_VOCAB,
    KINDS,
    NEW_KINDS,
    SHAPES,
    TEMPLATES,
    Question,
    SyntheticVideo,
    generate,
    render,
)
from livevlm.synthetic.draw import Draw
from livevlm.synthetic.events import draw_events
from test_synthetic import true_answer


def replayed(video: SyntheticVideo, question: Question) -> tuple[str, int | None]:
    """(answer, evidence frame) of any kind of question, from its words and what the frames show one by one."""
    if question.kind not in NEW_KINDS:
        return true_answer(video, question)
    words = question.text.split()
    (pair,) = [(a, b) for a, b in pairwise(words) if a in COLOURS and b in SHAPES]
    cells = [[cell for cell, shown in video.visible(f).items() if shown == pair] for f in range(question.frame)]
    shown = [frame for frame, where in enumerate(cells) if where]
    if question.kind == "count":
        times = sum(bool(now) and not before for before, now in zip([[], *cells], cells, strict=False))
        return ANSWERS["count"][times], shown[-1] if shown else None
    assert len(shown) >= 2 and all(len(where) <= 1 for where in cells)
    (row, column), (last_row, last_column) = (divmod(CELLS.index(cells[i][0]), 4) for i in (shown[0], shown[-1]))
    assert row == last_row or column == last_column
    step = (last_row > row) - (last_row < row), (last_column > column) - (last_column < column)
    return {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down", (0, 0): "still"}[step], shown[-1]


def test_new_kinds_are_true_and_balanced() -> None:
    given: dict[str, Counter[str]] = {kind: Counter() for kind in NEW_KINDS}
    for number, video in enumerate(generate(64, seed=5, num_videos=24, kinds=ALL_KINDS)):
        for question in video.questions(40, seed=number, at=[16 + i for i in range(40)], kinds=ALL_KINDS):
            assert (question.answer, question.evidence_frame) == replayed(video, question), question
            assert set(question.text.split()) | {question.answer} <= set(FULL_VOCAB)
        for question in video.questions(40, seed=number, kinds=[*NEW_KINDS, "exist"]):
            assert (question.answer, question.evidence_frame) == replayed(video, question), question
            if question.kind in NEW_KINDS:
                given[question.kind][question.answer] += 1
    for kind, counts in given.items():
        assert set(counts) == set(ANSWERS[kind])
        assert counts.most_common(1)[0][1] / counts.total() < 0.4, counts


def test_videos_for_new_kinds_have_a_name_of_their_own() -> None:
    """Without the new kinds every video is what it was; with them it is another."""
    (plain,), (same,) = generate(40, seed=3), generate(40, seed=3, kinds=KINDS)
    assert torch.equal(plain.frames, same.frames)
    assert not torch.equal(plain.frames, generate(40, seed=3, kinds=["count"])[0].frames)
    assert plain.questions(20, seed=1) == plain.questions(20, seed=1, kinds=KINDS)
    with pytest.raises(ValueError, match=r"kinds=\['often'\]: must be .*motion"):
        generate(4, seed=0, kinds=["often"])


def test_repeats_stay_few_in_long_videos() -> None:
    events = draw_events(4, 512, torch.Generator().manual_seed(0), repeats=True, walks=True)
    pair = events.shape * len(COLOURS) + events.colour
    for video in range(4):
        times = Counter(pair[video].tolist()).values()
        assert sum(2 <= count <= 4 for count in times) >= 2
        assert max(times) > 4


@pytest.mark.parametrize("num_frames", [2, 8, 40])
def test_batched_questions_are_true(num_frames: int) -> None:
    rng = torch.Generator().manual_seed(num_frames)
    events = draw_events(5, num_frames, rng, repeats=True, walks=True)
    asked = torch.tensor([num_frames, max(1, num_frames // 2), *range(1, num_frames, 3)])
    drawn, possible = Draw(events, asked, rng, ALL_KINDS, weights=torch.linspace(0.5, 1.5, len(ALL_KINDS))).draw()
    assert possible.all()
    kinds: Counter[str] = Counter()
    for number in range(5):
        video = SyntheticVideo(torch.empty(num_frames, 0), events.video(number))
        columns = torch.stack([value[number] for value in vars(drawn).values()], 1).tolist()
        for seen, (kind, shape, colour, cell, answer, evidence) in zip(asked.tolist(), columns, strict=True):
            name = ALL_KINDS[kind]
            text = TEMPLATES[name].format(shape=SHAPES[shape], colour=COLOURS[colour], cell=CELLS[cell])
            question = Question(text, FULL_VOCAB[answer], name, seen, None if evidence < 0 else evidence)
            assert (question.answer, question.evidence_frame) == replayed(video, question), question
            kinds[name] += 1
    assert num_frames < 40 or len(kinds) >= 8


def test_batched_frames_are_the_same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, which is drawn in another order, a batch has the pixels of its videos drawn one by one."""
    monkeypatch.setattr(render, "NOISE", 0.0)
    events = draw_events(3, 30, torch.Generator().manual_seed(1))
    first, second = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    apart, together = render.render(events, first, first), render.render_batch(events, second)
    assert torch.equal(torch.stack(apart), together)
    assert together.float().std() > 10
