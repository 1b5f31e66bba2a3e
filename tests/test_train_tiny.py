# SPDX-License-Identifier: Apache-2.0
"""The recipe of the tiny checkpoint: what it trains is what transformers and livevlm run, and training learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import livevlm
from livevlm import Stream
from livevlm.synthetic import (
    ALL_KINDS,
    CELLS,
    COLOURS,
    KINDS,
    SHAPES,
    TOKENS_PER_FRAME,
    VOCAB,
    Question,
    SyntheticVideo,
    generate,
)
from plain_model import CHECKPOINT
from test_synthetic_batch import replayed

RECIPE = Path(__file__).parents[1] / "examples" / "train_tiny"


@pytest.fixture(scope="module", autouse=True)
def recipe() -> Any:
    """The recipe's modules import each other as scripts do."""
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, from start to card, with the smallest settings."""
    from train import main

    out = tmp_path_factory.mktemp("tiny")
    sizes = "--steps 3 --warm-steps 2 --frames 8 --questions 8 --longest 4 --eval-videos 2 --device cpu"
    main([*sizes.split(), "--out", str(out)])
    return out


def test_the_script_leaves_a_checkpoint(folder: Path) -> None:
    embedded = {path.name for path in CHECKPOINT.iterdir()}
    assert embedded <= {path.name for path in folder.iterdir()}
    assert (folder / "model.safetensors").stat().st_size < 12e6
    (video,) = generate(4, seed=0)
    stream = Stream(*livevlm.load(folder, device="cpu"))
    stream.push(video.frames)
    assert isinstance(stream.ask("how many times did a red star appear ?"), str)
    measured = json.loads((folder / "eval.json").read_text())
    assert measured["old"][0]["frames"] == 4 and measured["new"][0]["videos"] == 2
    assert sum(measured["old"][0]["asked"].values()) == 32
    assert "| 4 | 2 | " in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["done"]


def test_the_words_are_the_tokenizers(folder: Path) -> None:
    from words import PREFIX, question_ids

    old = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    new = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [new[word] for word in VOCAB] == [old[word] for word in VOCAB]
    processor = livevlm.load(folder, device="cpu").processor
    (video,) = generate(32, seed=0, kinds=ALL_KINDS)
    for question in video.questions(40, seed=0, kinds=ALL_KINDS):
        before, behind = processor.prompt(question.text)
        assert tuple(before.tolist()) == PREFIX
        assert behind.tolist() == question_ids(question.text)[1:]


@torch.no_grad()
def test_packed_forward_is_the_models_own() -> None:
    """Every question of a batch gets the logits of transformers' own pass over the frames it may see."""
    from packed import packed_forward
    from words import Encoder, question_ids

    checkpoint = livevlm.load("tiny", device="cpu")
    model, embed = checkpoint.model, checkpoint.model.get_input_embeddings()
    videos = generate(9, seed=2, num_videos=2)
    asked = [9, 1, 4, 9, 6]
    questions = [video.questions(len(asked), seed=3, at=asked) for video in videos]
    encoder = Encoder(torch.device("cpu"))
    ids, answer_at = encoder.asked(questions)
    start = torch.arange(9) * TOKENS_PER_FRAME
    frames = torch.stack([video.frames for video in videos])
    packed, ends, features = packed_forward(model, frames, ids, answer_at, torch.tensor(asked), start)
    for b, video in enumerate(videos):
        pixels = checkpoint.processor.pixels(video.frames, 112)
        assert (model.model.get_video_features(pixels[None]).pooler_output[0] - features[b]).abs().max() < 1e-5
        for k, question in enumerate(questions[b]):
            before, _ = checkpoint.processor.prompt(question.text)
            answer = VOCAB.index(question.answer)
            words = embed(torch.tensor([*question_ids(question.text)[1:], answer]))
            video_rows = features[b, : asked[k] * TOKENS_PER_FRAME]
            rows = torch.cat([embed(before), video_rows, model.model.image_newline[None], words])
            logits = model(inputs_embeds=rows[None]).logits[0]
            assert (logits[-2] - packed[b, k]).abs().max() < 1e-4
            assert (logits[-1] - ends[b, k]).abs().max() < 1e-4


def test_positions_with_gaps() -> None:
    """A question goes on behind the last frame it sees, wherever that frame is."""
    from packed import layout
    from words import PREFIX, ROWS

    start = torch.tensor([0, 40, 60])
    positions, mask = layout(torch.tensor([2, 3]), start, torch.float32)
    video = len(PREFIX) + 3 * TOKENS_PER_FRAME
    assert positions[video] == len(PREFIX) + 40 + TOKENS_PER_FRAME
    assert positions[video + ROWS] == len(PREFIX) + 60 + TOKENS_PER_FRAME
    assert mask.shape[1] % 8 == 0 and (mask == 0).any(1).all()
    sees = mask == 0
    assert (
        sees[0, : len(PREFIX) + 2 * TOKENS_PER_FRAME].all() and sees[0, len(PREFIX) + 2 * TOKENS_PER_FRAME :].sum() == 1
    )
    assert sees[ROWS, :video].all() and sees[ROWS, video:].nonzero().tolist() == [[ROWS]]


def test_batches_teach_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch holds of a video is what the generator says of it, word for word."""
    import batches
    from words import ID, NEWLINE

    drawn: list[Any] = []
    original = batches.draw_events
    monkeypatch.setattr(batches, "draw_events", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1])
    shape = batches.shape_of(16, 64, 64)
    assert shape == (16, 4, 16)
    batch = batches.Batches(torch.device("cpu"), seed=0).draw(shape, gaps=1.0)
    assert batch.frame_start[0] == 0 and (batch.frame_start.diff() >= TOKENS_PER_FRAME).all()
    words = {index: word for word, index in ID.items()}
    for b in range(shape.videos):
        video = SyntheticVideo(batch.frames[b], drawn[0].video(b))
        for k, seen in enumerate(batch.asked.tolist()):
            ids, at = batch.ids[b, k].tolist(), int(batch.answer_at[b, k])
            assert ids[0] == NEWLINE and ids[at + 1] == batch.answer[b, k]
            text = " ".join(words[token] for token in ids[1 : at - 2])
            question = Question(text, words[ids[at + 1]], ALL_KINDS[int(batch.kind[b, k])], seen, None)
            assert replayed(video, question)[0] == question.answer, question
        for frame in range(shape.frames):
            shown = [("nothing", "nothing")] * TOKENS_PER_FRAME
            for cell, pair in video.visible(frame).items():
                shown[CELLS.index(cell)] = pair
            labels = zip(batch.colours[b, frame].tolist(), batch.shapes[b, frame].tolist(), strict=True)
            assert [((*COLOURS, "nothing")[c], (*SHAPES, "nothing")[s]) for c, s in labels] == shown


@torch.no_grad()
def test_the_embedded_checkpoint_answers_a_batch() -> None:
    """Trained long ago by other code, it has learned what batches ask: also with gaps between frames' positions."""
    from batches import Batches, shape_of
    from packed import packed_forward

    model = livevlm.load("tiny", device="cpu").model
    batch = Batches(torch.device("cpu"), seed=5, kinds=KINDS).draw(shape_of(24, 96, 128), gaps=1.0)
    answers, ends, _ = packed_forward(model, batch.frames, batch.ids, batch.answer_at, batch.asked, batch.frame_start)
    assert (answers.argmax(-1) == batch.answer).float().mean() > 0.94
    assert (ends.argmax(-1) == VOCAB.index("<|im_end|>")).all()


def test_training_learns() -> None:
    """A few steps on one batch: the loss on the answers and on what cells show falls."""
    from batches import Batches, shape_of
    from folder import build_model
    from learner import Learner

    device = torch.device("cpu")
    torch.manual_seed(0)
    learner = Learner(build_model(), device)
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    batch = Batches(device, seed=1, kinds=KINDS).draw(shape_of(4, 16, 32))
    learner.set_rate(1.0)
    learner.label_weight.fill_(0.5)
    losses = []
    for _ in range(12):
        learner.step(batch)
        losses.append(learner.read())
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"], [row["loss"] for row in losses]
    assert losses[-1]["label_loss"] < losses[0]["label_loss"]
    still = [name for name, value in learner.model.named_parameters() if torch.equal(value, before[name])]
    assert all("post_layernorm" in name for name in still), still


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of a step reads a value back, has a size that depends on data, or copies from the host: all of
    these break a CUDA graph. (The optimizer's own step differs by device; it is left out.)"""
    from batches import Batches, shape_of
    from folder import build_model
    from learner import Learner

    class Watch(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    device = torch.device("cpu")
    learner = Learner(build_model(), device)
    batch = Batches(device, seed=1).draw(shape_of(4, 8, 8))
    monkeypatch.setattr(learner.optimizer, "step", lambda: None)
    with Watch() as watch:
        learner.step(batch)
    waits = {"_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "_unique2", "lift_fresh", "one_hot"}
    assert len(watch.names) > 40 and not watch.names & waits, watch.names & waits


@pytest.mark.cuda
def test_graphs_train_as_eager_steps_do() -> None:
    from batches import Batches, shape_of
    from folder import build_model
    from graphs import EAGER_STEPS, GraphedSteps
    from learner import Learner

    device = torch.device("cuda")
    eager, graphed = Learner(build_model(), device), Learner(build_model(), device)
    graphed.model.load_state_dict(eager.model.state_dict())
    graphed.head.load_state_dict(eager.head.state_dict())
    steps = GraphedSteps(graphed)
    batches = Batches(device, seed=0)
    for turn in range(2 * (EAGER_STEPS + 3)):
        shape = shape_of((8, 16)[turn % 2], 64, 64)
        batch = batches.draw(shape)
        for learner in (eager, graphed):
            learner.set_rate(0.1 + 0.05 * turn)
            learner.label_weight.fill_(0.5)
        eager.step(batch)
        steps(shape, batch)
        losses = [learner.read()["loss"] for learner in (eager, graphed)]
        assert losses[0] == pytest.approx(losses[1], rel=0.03), turn
    assert len(steps.captured) == 2


def test_a_stop_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train
    from learner import Learner

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "step", stop)
    arguments = f"--out {tmp_path} --warm-steps 0 --frames 8 --questions 8 --device cpu"
    options = train.parse(arguments.split())
    learner = Learner(train.build_model(), torch.device("cpu"))
    assert train.train(options, learner, 0.0, train.Log(tmp_path, 0.0)) == 0
    assert (tmp_path / "model.safetensors").exists()


def test_schedule() -> None:
    from schedule import Schedule

    schedule = Schedule(longest=64)
    assert schedule.lengths(0.0) == [2, 4, 8] and schedule.lengths(1.0) == [16, 64]
    assert max(Schedule().lengths(0.99)) == 1024
    assert schedule.learning_rate(0.0, 0) < schedule.learning_rate(0.0, 500) == 1.0
    assert schedule.learning_rate(1.0, 9999) == pytest.approx(0.04)
    assert schedule.label_weight(0.0) == 0.5 and schedule.label_weight(1.0) > 0
