# SPDX-License-Identifier: Apache-2.0
"""The synthetic videos: the same for the same seed, and every answer true."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from livevlm.synthetic import (
    ALL_KINDS,
    ANSWERS,
    CELLS,
    CHANCE,
    COLOURS,
    FRAME_SIZE,
    KINDS,
    SHAPES,
    TEMPLATES,
    TOKENS_PER_FRAME,
    VOCAB,
    Question,
    SyntheticVideo,
    generate,
)
from livevlm.synthetic.events import MAX_LIFE
from livevlm.synthetic.render import FRAMES_AT_ONCE, RGB
from plain_model import CHECKPOINT, answers


@pytest.fixture(scope="module")
def videos() -> list[SyntheticVideo]:
    return generate(48, seed=11, num_videos=6)


def appearances(video: SyntheticVideo, seen: int) -> list[tuple[str, str, str, int]]:
    """(shape, colour, last cell, last frame) of every object seen, in order of first appearance.

    Found by replaying the frames one by one, without any of the code that draws questions.
    """
    found: dict[int, tuple[str, str, str, int]] = {}
    for frame in range(seen):
        # Two objects never start at the same frame, so the order within a frame does not matter.
        for cell, event in zip(CELLS, video.events.occupant[frame].tolist(), strict=True):
            if event >= 0:
                shape = SHAPES[video.events.shape[event]]
                found[event] = (shape, COLOURS[video.events.colour[event]], cell, frame)
    return list(found.values())


def true_answer(video: SyntheticVideo, question: Question) -> tuple[str, int | None]:
    """(answer, evidence frame), from the words of the question and a replay of the video."""
    words = question.text.split()
    objects = appearances(video, question.frame)
    if question.kind.startswith("now"):
        shown = video.visible(question.frame - 1).get(words[words.index("at") + 1])
        return ("nothing" if shown is None else shown[question.kind == "now_shape"]), None
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    matching = [
        (place, thing)
        for place, thing in enumerate(objects)
        if (not shapes or thing[0] == shapes[0]) and (not colours or thing[1] == colours[0])
    ]
    if question.kind == "exist":
        return ("yes", max(thing[3] for _, thing in matching)) if matching else ("no", None)
    assert len(matching) == 1, f"{question} names {len(matching)} objects"
    place, (shape, colour, cell, last) = matching[0]
    if question.kind in ("before", "after"):
        other = objects[place - 1 if question.kind == "before" else place + 1]
        assert question.kind == "after" or place > 0
        return other[0], min(last, other[3])
    return {"recall_colour": colour, "recall_shape": shape, "where": cell}[question.kind], last


def test_same_seed_same_video() -> None:
    first, again = generate(20, seed=3, num_videos=2), generate(20, seed=3, num_videos=2)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert one.questions(30, seed=5) == other.questions(30, seed=5)
    assert not torch.equal(first[0].frames, first[1].frames)
    assert not torch.equal(first[0].frames, generate(20, seed=4, num_videos=2)[0].frames)
    assert first[0].questions(30, seed=5) != first[0].questions(30, seed=6)


def test_frames_are_frozen() -> None:
    """The checkpoint was trained on these draws: a change here asks it about something else."""
    video = generate(32, seed=0, num_videos=4)[1]
    assert video.frames.double().mean().item() == pytest.approx(107.808, abs=0.01)
    assert [(question.text, question.answer) for question in video.questions(3, seed=0)] == [
        ("what shape came after the triangle ?", "diamond"),
        ("did a cyan cross appear ?", "no"),
        ("what shape is at b2 now ?", "nothing"),
    ]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 64, FRAMES_AT_ONCE + 3])
def test_frames(num_frames: int) -> None:
    (video,) = generate(num_frames, seed=1)
    assert video.frames.shape == (num_frames, 3, FRAME_SIZE, FRAME_SIZE)
    assert video.frames.dtype == torch.uint8
    assert video.fps == 1.0
    assert len(video) == num_frames
    assert video.frames.float().std() > 10
    if num_frames > 1:
        assert all(not torch.equal(a, b) for a, b in pairwise(video.frames)), "every frame has its own noise"
    assert len(video.questions(5, seed=0)) == 5


def test_objects_are_drawn_where_the_events_say(videos: list[SyntheticVideo]) -> None:
    """The colour at the middle of every solid object is its own, up to tint, brightness and noise."""
    solid = {"circle", "square", "cross", "diamond"}
    checked = 0
    for video in videos:
        for frame in range(len(video)):
            for cell, (colour, shape) in video.visible(frame).items():
                if shape not in solid:
                    continue
                row, column = divmod(CELLS.index(cell), 4)
                middle = (slice(28 * row + 12, 28 * row + 16), slice(28 * column + 12, 28 * column + 16))
                pixels = video.frames[frame][:, middle[0], middle[1]].float().mean((1, 2)) / 255
                distance = (torch.tensor(RGB) - pixels).norm(dim=1)
                assert distance[COLOURS.index(colour)] < 0.3
                assert COLOURS[int(distance.argmin())] == colour
                checked += 1
    assert checked > 100


def test_events(videos: list[SyntheticVideo]) -> None:
    for video in videos:
        events = video.events
        assert len(set(events.start.tolist())) == len(events.start)
        assert events.cell.shape == events.visible.shape == (len(events.start), MAX_LIFE)
        frames, cells = (events.occupant >= 0).nonzero(as_tuple=True)
        age = frames - events.start[events.occupant[frames, cells]]
        assert torch.equal(events.cell[events.occupant[frames, cells], age], cells)
        assert int(events.visible.sum()) == len(frames)
        for at in (1, 20, 48):
            last = events.last_visible(torch.tensor([at]))[:, 0]
            replayed = {thing[3] for thing in appearances(video, at)}
            assert set(last[last >= 0].tolist()) == replayed


def test_answers_are_true_at_any_moment(videos: list[SyntheticVideo]) -> None:
    kinds: Counter[str] = Counter()
    for number, video in enumerate(videos):
        moments = [1 + (7 * i + number) % len(video) for i in range(200)]
        for question, moment in zip(video.questions(200, seed=number, at=moments), moments, strict=True):
            assert question.frame == moment
            assert (question.answer, question.evidence_frame) == true_answer(video, question), question
            assert question.answer in ANSWERS[question.kind]
            assert set(question.text.split()) | {question.answer} <= set(VOCAB)
            kinds[question.kind] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 40


def test_answers_do_not_give_themselves_away(videos: list[SyntheticVideo]) -> None:
    """Half of the "exist" answers are yes, some cells are empty, and no kind has one answer only."""
    given: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for video in videos:
        for question in video.questions(200, seed=1):
            given[question.kind][question.answer] += 1
    assert 0.4 < given["exist"]["yes"] / given["exist"].total() < 0.6
    for kind in ("now_shape", "now_colour"):
        assert 0.1 < given[kind]["nothing"] / given[kind].total() < 0.6
    for kind in KINDS:
        assert given[kind].most_common(1)[0][1] / given[kind].total() < 0.6


def test_kinds_can_be_chosen(videos: list[SyntheticVideo]) -> None:
    video = videos[0]
    for kind in KINDS:
        questions = video.questions(10, seed=2, kinds=[kind])
        assert {question.kind for question in questions} == {kind}
    both = video.questions(60, seed=2, kinds=["before", "exist"])
    assert Counter(question.kind for question in both).keys() == {"before", "exist"}


def test_impossible_kinds_are_replaced_or_refused() -> None:
    video = next(video for video in generate(40, seed=0, num_videos=9) if not video.visible(0))
    assert {q.kind for q in video.questions(40, seed=0, at=1)} == {"now_shape", "now_colour", "exist"}
    replaced = video.questions(40, seed=0, at=1, kinds=["before", "now_colour"])
    assert {q.kind for q in replaced} == {"now_colour"}
    assert {q.kind for q in video.questions(40, seed=0, at=1, kinds=["where", "exist"])} == {"exist"}
    with pytest.raises(ValueError, match=r"kinds=\['where', 'before'\].* after 1 frames"):
        video.questions(40, seed=0, at=1, kinds=["before", "where"])


def test_vocabulary() -> None:
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    assert [ids[word] for word in VOCAB] == list(range(len(VOCAB)))
    assert ALL_KINDS == tuple(TEMPLATES) == tuple(ANSWERS) == tuple(CHANCE)
    assert ALL_KINDS[: len(KINDS)] == KINDS, "the embedded checkpoint knows these, in this order"
    assert len(CELLS) == TOKENS_PER_FRAME == 16
    assert CHANCE["where"] == 1 / 16
    assert CHANCE["exist"] == 1 / 2
    assert CHANCE["now_shape"] == 1 / 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, r"num_frames=0: must be an integer of at least 1"),
        ({"num_frames": 2.5}, r"num_frames=2.5"),
        ({"num_frames": True}, r"num_frames=True"),
        ({"num_videos": -1}, r"num_videos=-1"),
        ({"seed": -1}, r"seed=-1: must be an integer from 0 to"),
        ({"seed": "x"}, r"seed='x'"),
    ],
)
def test_generate_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**({"num_frames": 4, "seed": 0} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count=0: must be an integer of at least 1"),
        ({"seed": None}, r"seed=None"),
        ({"at": 0}, r"at=0: must be an integer from 1 to 48"),
        ({"at": 49}, r"at=49: must be an integer from 1 to 48"),
        ({"at": [1, 2, 3]}, r"at has 3 entries: must have one for each of 2 questions"),
        ({"at": [1, 99]}, r"at=99"),
        ({"kinds": []}, r"kinds=\[\]"),
        ({"kinds": "where"}, r"kinds='where'"),
        ({"kinds": ["where", "when"]}, r"kinds=\['where', 'when'\].*recall_colour, "),
    ],
)
def test_questions_refuses(videos: list[SyntheticVideo], change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        videos[0].questions(**({"count": 2, "seed": 0} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frame=48: must be an integer from 0 to 47"):
        videos[0].visible(48)


def test_the_checkpoint_knows_these_videos() -> None:
    """With its full cache the checkpoint answers nearly all; with the last frames alone it cannot."""
    right = blinded = total = 0
    for number, video in enumerate(generate(32, seed=123, num_videos=8)):
        questions = video.questions(16, seed=number)
        asked = [(question.text, question.frame) for question in questions]
        truth = [question.answer for question in questions]
        right += sum(map(str.__eq__, answers(video.frames, asked), truth))
        blinded += sum(map(str.__eq__, answers(video.frames[-4:], [(text, 4) for text, _ in asked]), truth))
        total += len(questions)
    assert total == 128
    assert right / total >= 0.95
    assert blinded / total <= 0.70


def test_sample_questions_are_true() -> None:
    """The questions that come with the sample video belong to the video of its seed."""
    sample = json.loads((Path(__file__).parents[1] / "examples" / "sample.json").read_text(encoding="utf-8"))
    (video,) = generate(sample["seconds"], seed=sample["seed"])
    assert len(sample["questions"]) == 12
    assert len({entry["kind"] for entry in sample["questions"]}) >= 6
    for entry in sample["questions"]:
        minutes, seconds = map(int, entry["time"].split(":"))
        for seen in {60 * minutes + seconds, min(60 * minutes + seconds + 1, len(video))}:
            question = Question(entry["question"], entry["answer"], entry["kind"], seen, None)
            assert true_answer(video, question)[0] == entry["answer"]
