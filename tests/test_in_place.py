# SPDX-License-Identifier: Apache-2.0
"""Reading the memory in place, through block tables, is the same as gathering it for PyTorch's attention."""

from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
import torch

import livevlm
from livevlm import Config, LiveCache, Stream
from livevlm.errors import ConfigError
from livevlm.synthetic import generate
from livevlm_kernels import backends
from streams import PROMPT, pixels, times, tiny_random
from test_parity import ask

IN_PLACE = [
    pytest.param(backend, device, marks=[pytest.mark.cuda] if device == "cuda" else [], id=f"{backend}-{device}")
    for device in ("cpu", "cuda")
    for backend in backends("block_attention", device)
    if device == "cuda" or backend != "triton"
]
SETTINGS = {
    "everything": {"policy": "full", "retrieval": "none"},
    "blocks": {"policy": "full", "retrieval": "mean_key", "block_size": 8},
    "frames": {"policy": "full", "retrieval": "frame", "num_retrieved_frames": 5},
    "evicted": {"policy": "vision_sink", "budget": 48, "retrieval": "mean_key", "block_size": 8, "clip_frames": 6},
}


def hidden(config: Config, device: str) -> list[torch.Tensor]:
    """Hidden states of two questions, with another clip between them."""
    model = tiny_random().to(device)
    cache = LiveCache(model, config)
    cache.prefill_prompt(PROMPT)
    found = []
    for start in (0, 17):
        cache.push(pixels(17, seed=start).to(device), times(17, start))
        found.append(ask(cache).cpu())
    return found


@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("backend", "device"), IN_PLACE)
def test_same_hidden_states(backend: str, device: str, name: str, positions: str) -> None:
    config = Config(**{"positions": positions, **SETTINGS[name]})
    gathered = hidden(dataclasses.replace(config, attention="sdpa"), device)
    in_place = hidden(dataclasses.replace(config, attention=backend), device)
    for a, b in zip(in_place, gathered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("retrieval", ["none", "mean_key"])
@pytest.mark.parametrize(("backend", "device"), IN_PLACE)
def test_same_answers_and_evidence(backend: str, device: str, retrieval: str) -> None:
    # Evidence is the largest of many weights, which the checkpoint's own bfloat16 knows to 5 % only.
    checkpoint = livevlm.load("tiny", device=device, dtype=torch.float32 if retrieval == "none" else "auto")
    answers = []
    for attention in ("sdpa", backend):
        config = dataclasses.replace(checkpoint.config, attention=attention, retrieval=retrieval, pooling="softmax")
        for video in generate(24, seed=7, num_videos=2):
            stream = Stream(checkpoint.model, checkpoint.processor, config)
            stream.push(video.frames)
            answers.append([stream.ask(question.text) for question in video.questions(8, seed=1)])
    assert [str(a) for a in answers[:2]] == [str(a) for a in answers[2:]]
    if retrieval != "none" and device == "cuda":
        return  # bfloat16 may choose another block for the last one, and the others' weights depend on it
    for one, other in zip(chain(*answers[:2]), chain(*answers[2:]), strict=True):
        assert [e.weight for e in one.evidence] == pytest.approx([e.weight for e in other.evidence], abs=0.002)
        for mine, its in ((one.evidence, other.evidence), (other.evidence, one.evidence)):
            # The same frames; only of those that rounding cannot tell from the last one may another be there.
            missing = [e for e in mine if e.frame not in {i.frame for i in its}]
            assert all(e.weight == pytest.approx(its[-1].weight, abs=0.002) for e in missing)


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"attention='cuda' cannot run on cpu; allowed here: auto, sdpa, .*reference"):
        LiveCache(tiny_random(), Config(attention="cuda"))
    with pytest.raises(ConfigError, match="attention='flash' is unknown"):
        Config(attention="flash")  # type: ignore[arg-type]
