# SPDX-License-Identifier: Apache-2.0
"""Bad input: one typed error that says what is wrong and what is allowed, and a stream that is as usable as before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import livevlm
from livevlm import Config, ConfigError, FrameError, ModelError, QuestionError, StateError, Stream
from livevlm.synthetic import SHAPES, generate


@pytest.fixture(scope="module")
def tiny() -> livevlm.Checkpoint:
    return livevlm.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def running(tiny: livevlm.Checkpoint) -> tuple[Stream, str, str, list[torch.Tensor]]:
    """A stream, a question, its answer, and the memory's content."""
    video = generate(24, seed=5)[0]
    stream = Stream(*tiny)
    stream.push(video.frames)
    question = video.questions(1, seed=0)[0].text
    memory = stream.cache.memory
    content = [t[:, : memory.video_end].clone() for t in memory.tensors]
    return stream, question, stream.ask(question), content


def unharmed(running: tuple[Stream, str, str, list[torch.Tensor]]) -> bool:
    stream, question, answer, content = running
    memory = stream.cache.memory
    same = all(torch.equal(t[:, : memory.video_end], c) for t, c in zip(memory.tensors, content, strict=True))
    return same and stream.ask(question) == answer


GOOD = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
FRAMES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": ([], {}, "frames is empty"),
    "no pixels": (GOOD[:0], {}, r"shape \(0, 3, 112, 112\)"),
    "two channels": (GOOD[:, :2], {}, r"shape \(2, 2, 112, 112\); allowed: \[num_frames, 3"),
    "five dimensions": (GOOD[None], {}, "allowed"),
    "integers": (GOOD.int(), {}, "dtype torch.int32; allowed: uint8"),
    "NaN": (GOOD.float() * torch.nan, {}, "NaN or infinite"),
    "infinite": (GOOD.float() + torch.inf, {}, "NaN or infinite"),
    "0..255 in float": (GOOD.float() + 200, {}, "200..200; allowed: 0..1"),
    "another size": (GOOD[..., :100], {}, r"size \(112, 100\) but the stream's are \(112, 112\)"),
    "two sizes": ([GOOD[0], GOOD[1, :, :50]], {}, "different sizes"),
    "text": ("frames", {}, "allowed"),
    "objects": ([object()], {}, "object; allowed: tensors"),
    "an odd array": (np.zeros((3, 4)), {}, r"shape \(3, 4\)"),
    "too few times": (GOOD, {"times": [1.0]}, "times has 1 entries for 2 frames"),
    "NaN times": (GOOD, {"times": [30.0, float("nan")]}, "times hold NaN"),
    "times back": (GOOD, {"times": [3.0, 4.0]}, r"run backwards \(newest frame: 23.0 s\)"),
    "times mixed": (GOOD, {"times": [31.0, 30.0]}, "run backwards"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_bad_frames(running: Any, name: str) -> None:
    frames, options, says = FRAMES[name]
    with pytest.raises(FrameError, match=says):
        running[0].push(frames, **options)
    assert unharmed(running)


@pytest.mark.parametrize("question", ["", "   ", "\n", None, "what is <video> ?", "the <|im_end|> one ?"])
def test_bad_questions(running: Any, question: Any) -> None:
    with pytest.raises(QuestionError, match="question="):
        running[0].ask(question)
    assert unharmed(running)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": "3"},
        {"num_evidence": 1.5},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_evidence": -1},
    ],
)
def test_bad_options(running: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* must be"):
        running[0].ask("where was the star ?", **options)
    assert unharmed(running)


def test_question_before_any_frame(tiny: livevlm.Checkpoint) -> None:
    stream = Stream(*tiny)
    with pytest.raises(StateError, match="no frame has been pushed yet"):
        stream.ask("where was the star ?")
    with pytest.raises(StateError, match="no frame has been pushed yet"):
        stream.ask("where was the star ?", stream=True)
    stream.push(GOOD)
    assert stream.ask("what shape is at a1 now ?") in (*SHAPES, "nothing")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 0}, "budget=0 must be a whole number of at least 1"),
        ({"budget": -5}, "budget=-5"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": True}, "budget=True"),
        ({"policy": "best"}, "policy='best' is unknown; allowed: vision_sink, clip_merge"),
        ({"retrieval": "all"}, "retrieval='all' is unknown; allowed: mean_key, mass, frame, none"),
        ({"positions": "yarn"}, "positions='yarn'"),
        ({"scope": "head"}, "scope='head'"),
        ({"bucket_by": "frame"}, "bucket_by='frame'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"clip_frames": 0}, "clip_frames=0"),
        ({"scatter_ratio": 1.5}, "scatter_ratio=1.5 must lie between 0 and 1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"retrieval_ratio": 0}, "retrieval_ratio=0 must be above 0"),
        ({"max_memory": "lots"}, "max_memory='lots' must be a positive size"),
        ({"max_memory": "0GiB"}, "max_memory='0GiB'"),
        ({"max_memory": "1.2.3GiB"}, "max_memory"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**settings)


def test_budgets_that_hold_too_little(tiny: livevlm.Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"budget=15 tokens is too small.* at least 16"):
        Stream(*tiny[:2], Config(policy="recent", budget=15))
    with pytest.raises(ConfigError, match=r"max_memory='10KB' .* is too small"):
        Stream(*tiny[:2], Config(policy="recent", max_memory="10KB"))
    Stream(*tiny[:2], Config(policy="recent", budget=16))


def test_sizes_in_bytes() -> None:
    from livevlm.config import parse_bytes

    assert [parse_bytes(s) for s in (512, "512", "1KiB", "1.5 MB", "2GiB")] == [512, 512, 1024, 1_500_000, 2**31]


def test_unsupported_models(tiny: livevlm.Checkpoint, tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"'Linear' is not supported; supported: llava_onevision"):
        Stream(nn.Linear(2, 2), tiny.processor)
    with pytest.raises(ModelError, match="processor is a object"):
        Stream(tiny.model, object())
    for name in (tmp_path / "nothing", "tinyy"):
        with pytest.raises(ModelError, match=r"is no folder; allowed: 'tiny', a folder, or a hub name"):
            livevlm.load(name)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="'gpt2' model, which is not supported"):
        livevlm.load(tmp_path)


def test_settings_beside_a_checkpoint(tmp_path: Any) -> None:
    config = Config(policy="recent", budget=77)
    config.save_pretrained(tmp_path)
    assert Config.from_pretrained(tmp_path) == config
    assert Config.from_pretrained(tmp_path, budget=78).budget == 78
    with pytest.raises(ConfigError, match="is not a folder"):
        Config.from_pretrained(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    assert Config.from_pretrained(tmp_path / "bare") == Config()
    (tmp_path / "livevlm_config.json").write_text('{"bugdet": 3}')
    with pytest.raises(ConfigError, match="unknown settings: bugdet; allowed: policy, budget"):
        Config.from_pretrained(tmp_path)
    (tmp_path / "livevlm_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Config.from_pretrained(tmp_path)
    (tmp_path / "livevlm_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        Config.from_pretrained(tmp_path)
    (tmp_path / "livevlm_config.json").write_text('{"alpha": "x"}')
    with pytest.raises(ConfigError, match="alpha='x' must be a number"):
        Config.from_pretrained(tmp_path)
