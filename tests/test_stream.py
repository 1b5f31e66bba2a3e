# SPDX-License-Identifier: Apache-2.0
"""Stream: pushing, asking, and what must not change while doing so."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import livevlm
from livevlm import Config, Stream
from livevlm.synthetic import SyntheticVideo, generate

RETRIEVAL = [
    {"retrieval": "none"},
    {"retrieval": "mean_key", "block_size": 8},
    {"retrieval": "frame", "num_retrieved_frames": 3},
    {"retrieval": "mean_key", "pooling": "softmax", "positions": "original"},
]


@pytest.fixture(scope="module")
def tiny() -> livevlm.Checkpoint:
    return livevlm.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def video() -> SyntheticVideo:
    return generate(32, seed=5)[0]


def bits(stream: Stream) -> list[torch.Tensor]:
    memory = stream.cache.memory
    return [t[:, : memory.video_end].clone() for t in memory.tensors] + [stream.cache.queries.q.clone()]


@pytest.mark.parametrize("settings", RETRIEVAL, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("policy", ["full", "vision_sink", "similarity", "clip_merge"])
def test_a_question_changes_nothing(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, policy: str, settings: dict[str, object]
) -> None:
    stream = Stream(*tiny[:2], Config(policy=policy, budget=160, clip_frames=8, **settings))
    stream.push(video.frames)
    before, stats = bits(stream), stream.stats()
    question = "what colour was the star ?"
    first = stream.ask(question)
    for text in ("where was the red star ?", "what shape is at b2 now ?"):
        stream.ask(text)
    again = stream.ask(question)
    assert first == again and first.evidence == again.evidence
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))
    assert stream.stats().num_video_tokens == stats.num_video_tokens


def test_a_stream_that_nobody_has_is_gone(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    """At once, and its memory with it: on a GPU that is most of what it holds."""
    gc.collect()
    gc.disable()
    try:
        stream = Stream(tiny.model, tiny.processor, Config(budget=64, clip_frames=4))
        stream.push(video.frames[:8])
        stream.ask("star")
        with stream.watching((8.0 + i, f) for i, f in enumerate(video.frames[8:12])) as feed:
            feed.wait()
        memory, cache = weakref.ref(stream.cache.memory), weakref.ref(stream.cache)
        del stream, feed
        assert (memory(), cache()) == (None, None)
    finally:
        gc.enable()


def test_repeated_questions_are_bit_equal(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny[:2], Config(policy="similarity", budget=160, retrieval="mean_key"))
    stream.push(video.frames)
    cache = stream.cache
    embeds = cache.adapter.embed_question(stream.processor.prompt("did a red star appear ?")[1])

    def logits() -> torch.Tensor:
        with cache.question(), torch.no_grad():
            out = cache.adapter.language_model(inputs_embeds=embeds[None], past_key_values=cache)
            return cache.adapter.logits(out.last_hidden_state)

    first = logits()
    stream.ask("what shape came before the star ?")
    assert torch.equal(first, logits())


def test_right_answers(tiny: livevlm.Checkpoint) -> None:
    right = asked = 0
    for seed in range(3):
        video = generate(32, seed=100 + seed)[0]
        stream = Stream(*tiny)
        stream.push(video.frames)
        for question in video.questions(12, seed=seed):
            right += stream.ask(question.text) == question.answer
            asked += 1
    assert right / asked >= 0.9


def test_pieces_make_up_the_answer(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames)
    question = video.questions(1, seed=1)[0].text
    pieces = stream.ask(question, stream=True)
    assert isinstance(pieces, Iterator)
    assert "".join(pieces).strip() == stream.ask(question) != ""


def test_asking_between_pushes_does_not_change_what_is_remembered(
    tiny: livevlm.Checkpoint, video: SyntheticVideo
) -> None:
    quiet, asked = Stream(*tiny), Stream(*tiny)
    for clip in video.frames.split(8):
        quiet.push(clip)
        asked.push(clip)
        asked.ask("what shape is at a1 now ?")
    assert all(torch.equal(a, b) for a, b in zip(bits(quiet), bits(asked), strict=True))


def test_two_streams_on_one_model(tiny: livevlm.Checkpoint) -> None:
    videos = [generate(24, seed=s)[0] for s in (7, 8)]
    alone = []
    for video in videos:
        stream = Stream(*tiny)
        stream.push(video.frames)
        alone.append(bits(stream))
    streams = [Stream(*tiny), Stream(*tiny)]
    for first, second in zip(videos[0].frames.split(8), videos[1].frames.split(8), strict=True):
        streams[0].push(first)
        streams[1].push(second)
        streams[0].ask("where was the red star ?")
    for stream, expected in zip(streams, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(bits(stream), expected, strict=True))


def test_frames_in_any_form(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    frames = video.frames[:4]
    forms = {
        "tensor": frames,
        "channels last": frames.permute(0, 2, 3, 1).contiguous(),
        "array": frames.permute(0, 2, 3, 1).numpy(),
        "list of arrays": [np.asarray(f.permute(1, 2, 0)) for f in frames],
        "float": frames.float() / 255,
    }
    expected = None
    for name, form in forms.items():
        stream = Stream(*tiny)
        stream.push(form)
        expected = expected or bits(stream)
        assert all(torch.equal(a, b) for a, b in zip(bits(stream), expected, strict=True)), name


def test_times_reach_the_evidence(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames, times=[100 + 0.5 * i for i in range(32)])
    answer = stream.ask("what shape is at b2 now ?")
    assert answer.time == 115.5
    assert answer.evidence and all(e.time == 100 + 0.5 * e.frame for e in answer.evidence)
    assert 0 < answer.ttft <= answer.seconds


def test_evidence_points_at_the_frame(tiny: livevlm.Checkpoint) -> None:
    """Among the three frames named is one that shows what was asked for, for most questions that one frame answers."""
    found = asked = 0
    for seed in range(4):
        video = generate(64, seed=200 + seed)[0]
        stream = Stream(*tiny)
        stream.push(video.frames)
        for question in video.questions(16, seed=seed, kinds=["recall_colour", "where"]):
            frames = [e.frame for e in stream.ask(question.text).evidence]
            found += any(abs(frame - question.evidence_frame) <= 2 for frame in frames)
            asked += 1
    assert found / asked >= 0.75


def test_sampling_is_reproducible_and_varies(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames)
    ask = "what shape came before the star ?"
    draws = {stream.ask(ask, temperature=50.0, seed=seed) for seed in range(8)}
    assert len(draws) > 1
    assert stream.ask(ask, temperature=50.0, seed=3) == stream.ask(ask, temperature=50.0, seed=3)
    assert stream.ask(ask, temperature=50.0, top_p=1e-6, seed=3) == stream.ask(ask)


def test_a_long_question_grows_the_memory_and_is_forgotten(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames)
    before = bits(stream)
    stream.ask("what colour was the star ? " * 300)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))


def test_max_memory_sets_the_budget(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    per_token = 6 * 2 * 2 * 64 * 4
    stream = Stream(*tiny[:2], Config(policy="recent", max_memory=per_token * 100))
    stream.push(video.frames)
    assert stream.stats().num_video_tokens == 100
    assert stream.stats().kv_bytes == per_token * (100 + 2)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["vision", "language", "policy"])
def test_a_failure_while_reading_loses_nothing(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames[:16])
    before, stats = bits(stream), stream.stats()

    def fail(*args: object, **kwargs: object) -> None:
        raise Broken

    targets = {
        "vision": (stream.cache.adapter, "embed_frames"),
        "language": (stream.cache.adapter.language_model.layers[3].mlp, "forward"),
        "policy": (stream.cache.policy, "compress"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], fail)
        with pytest.raises(Broken):
            stream.push(video.frames[16:24])
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))
    assert stream.stats().num_frames == stats.num_frames
    stream.push(video.frames[16:])
    whole = Stream(*tiny)
    whole.push(video.frames[:16])
    whole.push(video.frames[16:])
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(stream), strict=True))


def test_a_failure_or_a_break_while_answering(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames)
    before, expected = bits(stream), stream.ask("where was the red star ?")
    for stop in (KeyboardInterrupt, Broken):
        calls = itertools.count()

        def fail_late(token_ids: torch.Tensor, stop: type = stop, calls: Iterator[int] = calls) -> torch.Tensor:
            if next(calls) >= 1:
                raise stop
            return type(stream.cache.adapter).embed_tokens(stream.cache.adapter, token_ids)

        with monkeypatch.context() as patch:
            patch.setattr(stream.cache.adapter, "embed_tokens", fail_late)
            with pytest.raises(stop):
                stream.ask("where was the red star ?")
    pieces = stream.ask("where was the red star ?", stream=True)
    next(pieces)
    with pytest.raises(livevlm.StateError, match="finish or close"):
        stream.push(video.frames[:1])
    pieces.close()
    stream.ask("where was the red star ?", stream=True)  # never started: nothing to close
    assert stream.ask("where was the red star ?") == expected
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))
