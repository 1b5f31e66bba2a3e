# SPDX-License-Identifier: Apache-2.0
"""Passes over static buffers compute what the stock model computes. Here they run as they are; on a GPU, as graphs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator

import pytest
import torch

import livevlm
from livevlm import Config, LiveCache, Stream
from livevlm.buffers import BUCKETS, NUM_FACTS
from livevlm.decoding import choose_blocks, next_logits
from livevlm.errors import ConfigError
from livevlm.replay import Replay
from livevlm.synthetic import generate
from streams import PROMPT, pixels, times, tiny_random

SETTINGS = {
    "everything": {"retrieval": "none"},
    "blocks": {"retrieval": "mean_key", "block_size": 8},
    "softmax": {"retrieval": "mean_key", "block_size": 8, "pooling": "softmax", "retrieval_ratio": 0.3},
    "mass": {"retrieval": "mass", "block_size": 8},
    "mass of all": {"retrieval": "mass", "block_size": 8, "retrieval_queries": "all"},
    "frames": {"retrieval": "frame", "num_retrieved_frames": 5, "retrieval_queries": "last"},
}
TOKENS = (11, 30, 12)  # an answer


def filled(**settings: object) -> LiveCache:
    cache = LiveCache(tiny_random(), Config(**{"policy": "full", **settings}))
    cache.replay = Replay(cache, capture=False)
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(17), times(17))
    return cache


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    """Of a question that has so many tokens, the newline that ends the video being one of them."""
    return torch.randint(90, (count - 1,), generator=torch.Generator().manual_seed(seed))


def embeds_of(cache: LiveCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cache.adapter.embed_question(ids)


def eager(cache: LiveCache, embeds: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Logits of each pass, blocks of each layer, keys of question and answer."""
    with cache.question() as turn, torch.no_grad():
        logits = [next_logits(cache, embeds)]
        for token in TOKENS:
            logits.append(next_logits(cache, cache.adapter.embed_tokens(torch.tensor([token]))))
        memory = cache.memory
        return logits, list(turn.blocks.values()), memory.k[:, memory.video_end : memory.end].clone()


def replayed(cache: LiveCache, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    replay, memory, count = cache.replay, cache.memory, 1 + ids.shape[0]
    retrieve = cache.config.retrieval != "none"
    assert replay.can_answer([(count, retrieve)], len(TOKENS))
    buffers, start = replay.buffers, memory.end
    assert buffers is not None
    buffers._pinned[NUM_FACTS:].random_(90)  # what an earlier question left behind this one
    if retrieve:
        cache.retrieval.summaries(memory)
    with cache.question():
        memory.open(BUCKETS[-1] + len(TOKENS))
        position = cache.num_stream_tokens
        replay.read_question(ids, start, position, after_video=True, retrieve=retrieve)
        memory.place_text(slice(start + count, memory.end), position + count)
        logits = [buffers.logits.clone()]
        for token in TOKENS:
            buffers.token.fill_(token)
            replay.read_token()
            logits.append(buffers.logits.clone())
        first, count = memory.video_start // memory.block_size, cache.retrieval.num_selected(memory)
        blocks = list(buffers.table[:, first : first + count] - first)
        return logits, blocks, memory.k[:, start : start + 1 + ids.shape[0] + len(TOKENS)].clone()


@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize("name", SETTINGS)
def test_same_logits_and_blocks(name: str, positions: str) -> None:
    """Lengths around the buckets; before the memory needs retrieval, when it does, and after it has grown."""
    cache = filled(positions=positions, **SETTINGS[name])
    for num_frames, lengths in ((0, (2, 16)), (20, (15, 17, 32)), (120, (33,))):
        if num_frames:
            cache.push(pixels(num_frames, seed=num_frames), times(num_frames, 200 + num_frames))
        for length in lengths:
            ids = ids_of(length)
            before = cache.memory.k[:, : cache.memory.video_end].clone()
            for got, expected in zip(replayed(cache, ids), eager(cache, embeds_of(cache, ids)), strict=True):
                for a, b in zip(got, expected, strict=not isinstance(got, list) or bool(expected)):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert torch.equal(cache.memory.k[:, : cache.memory.video_end], before)
    assert (name == "everything") != cache.retrieval.is_needed(cache.memory)


@pytest.mark.parametrize("name", ["blocks", "mass"])
def test_only_the_tokens_of_the_question_choose_blocks(name: str) -> None:
    """Whatever stands in the padding."""
    cache = filled(**SETTINGS[name])
    ids = ids_of(5)
    (first, *_), blocks, _ = replayed(cache, ids)
    for _ in range(3):
        (again, *_), same, _ = replayed(cache, ids)
        assert torch.equal(first, again) and all(torch.equal(a, b) for a, b in zip(blocks, same, strict=True))


# -------------------------------------------------------------------- answers
@pytest.fixture(scope="module")
def tiny() -> livevlm.Checkpoint:
    return livevlm.load("tiny", device="cpu", dtype=torch.float32)


def pair(tiny: livevlm.Checkpoint, config: Config, frames: torch.Tensor) -> Iterator[Stream]:
    """A stream on the stock model, and one on static buffers."""
    for replays in (False, True):
        stream = Stream(tiny.model, tiny.processor, config)
        if replays:
            stream.cache.replay = Replay(stream.cache, capture=False)
        stream.push(frames)
        yield stream


@pytest.mark.parametrize(
    "settings",
    [{}, *({"retrieval": name} for name in ("mean_key", "mass")), {"retrieval": "frame", "num_retrieved_frames": 8}],
    ids=lambda s: s.get("retrieval", "none"),
)
@pytest.mark.parametrize("retrieval_pass", ["inline", "two_pass"])
def test_same_answers_and_evidence(tiny: livevlm.Checkpoint, settings: dict, retrieval_pass: str) -> None:
    config = dataclasses.replace(tiny.config, policy="full", retrieval_pass=retrieval_pass, **settings)
    (video,) = generate(32, seed=11)
    stock, ours = pair(tiny, config, video.frames)
    for question in video.questions(6, seed=1):
        for options in ({}, {"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_new_tokens": 6}):
            expected, got = stock.ask(question.text, **options), ours.ask(question.text, **options)
            assert got == expected and got.num_tokens == expected.num_tokens
            assert [e.frame for e in got.evidence][:1] == [e.frame for e in expected.evidence][:1]
            weights = [e.weight for e in expected.evidence]
            assert [e.weight for e in got.evidence] == pytest.approx(weights, abs=1e-3)
    assert (stock.stats().graphs, ours.stats().graphs) == ("off: cpu", "on")


def test_an_answer_ends_where_it_should(tiny: livevlm.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    (video,) = generate(16, seed=12)
    stock, ours = pair(tiny, tiny.config, video.frames)
    for stream in (stock, ours):
        monkeypatch.setattr(stream, "_stop", frozenset())
    for count in (1, 2, 5):
        answers = [s.ask("what colour was the star ?", max_new_tokens=count) for s in (stock, ours)]
        assert answers[0] == answers[1] and answers[0].num_tokens == answers[1].num_tokens == count


@pytest.mark.parametrize("leave", ["close", "interrupt"])
def test_an_answer_that_is_left_changes_nothing(
    tiny: livevlm.Checkpoint, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (video,) = generate(16, seed=13)
    _, stream = pair(tiny, tiny.config, video.frames)
    memory, question = stream.cache.memory, video.questions(1, seed=1)[0].text
    expected = stream.ask(question)
    before = [t[:, : memory.video_end].clone() for t in memory.tensors]
    if leave == "close":
        monkeypatch.setattr(stream, "_stop", frozenset())
        pieces = stream.ask(question, stream=True, max_new_tokens=8)
        next(pieces)
        pieces.close()
        monkeypatch.undo()
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Replay, "read_token", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            stream.ask(question)
    assert all(torch.equal(t[:, : memory.video_end], b) for t, b in zip(memory.tensors, before, strict=True))
    assert stream.ask(question) == expected
    stream.push(video.frames[:2])


def test_a_question_longer_than_the_largest_bucket(tiny: livevlm.Checkpoint) -> None:
    (video,) = generate(16, seed=14)
    stock, ours = pair(tiny, tiny.config, video.frames)
    long = "what colour was the star ? " * 60
    assert ours.ask(long, max_new_tokens=2) == stock.ask(long, max_new_tokens=2)
    assert ours.stats().graphs.startswith("off: a question of ")
    short = video.questions(1, seed=1)[0].text
    assert ours.ask(short) == stock.ask(short) and ours.stats().graphs == "on"


# -------------------------------------------------------------------- whether
def test_where_graphs_are_not_possible(tiny: livevlm.Checkpoint) -> None:
    with pytest.raises(ConfigError, match="graphs='on' is not possible here: cpu; allowed: 'auto', 'off'"):
        LiveCache(tiny_random(), Config(graphs="on"))
    with pytest.raises(ConfigError, match="graphs='yes' is unknown"):
        Config(graphs="yes")  # type: ignore[arg-type]
    assert Replay(filled(graphs="off"), capture=False).said == "off: graphs='off'"
    assert Replay(filled(attention="sdpa"), capture=False).said == "off: attention='sdpa'"
    cache = filled()
    handle = cache.adapter.language_model.layers[1].mlp.register_forward_hook(lambda *args: None)
    assert Replay(cache, capture=False).said == "off: a Qwen2MLP has hooks"
    handle.remove()
    tokens = torch.zeros((1, 3), dtype=torch.int64)
    cache.adapter.language_model(tokens, output_hidden_states=True)  # leaves hooks, which do nothing in other calls
    replay, kinds = Replay(cache, capture=False), [(3, False)]
    assert replay.said == "on" and replay.can_answer(kinds, 1)
    decoder = replay._decoder
    assert replay.can_answer(kinds, 1) and replay._decoder is decoder
    first = cache.adapter.language_model.layers[0]
    handle = first.register_forward_pre_hook(lambda *args: None)
    assert not replay.can_answer(kinds, 1) and replay.said == "off: a Qwen2DecoderLayer has hooks"
    handle.remove()
    first.mlp.up_proj.weight.data = first.mlp.up_proj.weight.data.clone()
    assert replay.can_answer(kinds, 1) and replay._decoder is not decoder, "a weight has moved"
    decoder = replay._decoder
    first.mlp.up_proj = torch.nn.Sequential(first.mlp.up_proj)
    assert replay.can_answer(kinds, 1) and replay._decoder is not decoder, "a module was exchanged"


@pytest.mark.parametrize("retrieval_pass", ["inline", "two_pass"])
def test_later_layers_that_change_are_noticed_when_the_first_ones_have_read(retrieval_pass: str) -> None:
    tiny = livevlm.load("tiny", device="cpu", dtype=torch.float32)
    (video,) = generate(16, seed=18)
    config = Config(policy="full", retrieval="mean_key", block_size=8, retrieval_pass=retrieval_pass, max_new_tokens=3)
    stock, ours = pair(tiny, config, video.frames)
    stock._stop = ours._stop = frozenset()
    text = video.questions(1, seed=1)[0].text
    assert ours.ask(text) == stock.ask(text)
    before = stock.ask(text)
    last = tiny.model.model.language_model.layers[-1].mlp.down_proj
    last.weight.data = last.weight.data * -3
    assert stock.ask(text) != before
    assert ours.ask(text) == stock.ask(text) and ours.stats().graphs == "on"
    calls = []
    handle = last.register_forward_hook(lambda *args: calls.append(1))
    expected = stock.ask(text)
    del calls[:]
    assert ours.ask(text) == expected and len(calls) >= 3, "the hook was called"
    assert ours.stats().graphs == "off: a Linear has hooks"
    handle.remove()
    assert ours.ask(text) == expected and ours.stats().graphs == "on"
    assert ours.cache.memory.num_new_tokens == 0


def test_a_failure_to_capture_is_told(tiny: livevlm.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    (video,) = generate(16, seed=15)
    stock, ours = pair(tiny, tiny.config, video.frames)

    def fail(self: Replay, *args: object) -> None:
        raise RuntimeError("no graph today")

    monkeypatch.setattr(Replay, "_capture", fail)
    for question in video.questions(2, seed=1):
        assert ours.ask(question.text) == stock.ask(question.text)
        assert ours.stats().graphs == "failed: RuntimeError: no graph today"
    monkeypatch.undo()
    ours.warmup()
    assert ours.stats().graphs == "on"


def test_a_reset_forgets_all_that_was_captured(tiny: livevlm.Checkpoint) -> None:
    videos = generate(16, seed=16, num_videos=2)
    _, stream = pair(tiny, tiny.config, videos[0].frames)
    question = videos[1].questions(1, seed=1)[0].text
    stream.ask(question)
    memory = weakref.ref(stream.cache.memory)
    stream.cache.reset()
    assert memory() is None, "nothing holds on to the old memory"
    fresh = Stream(tiny.model, tiny.processor, tiny.config)
    for each in (stream.cache, fresh.cache):
        each.prefill_prompt(tiny.processor.prompt("?")[0])
        each.push(pixels_of(tiny, videos[1].frames), times(16))
    assert stream.ask(question) == fresh.ask(question)


def pixels_of(tiny: livevlm.Checkpoint, frames: torch.Tensor) -> torch.Tensor:
    return tiny.processor.pixels(frames, tiny.model.config.vision_config.image_size)


# -------------------------------------------------------------------- two passes
def test_two_passes_choose_by_the_text_alone() -> None:
    """The blocks are those that the text's own queries choose, and the question's tokens then attend to these."""
    cache = filled(retrieval_pass="two_pass", **SETTINGS["blocks"])
    text, embeds = embeds_of(cache, ids_of(6, seed=1))[1:], embeds_of(cache, ids_of(12))
    alone = eager(cache, text)[1]
    with cache.question() as turn:
        choose_blocks(cache, text)
        assert cache.memory.num_new_tokens == 0
        next_logits(cache, embeds)
        blocks = list(turn.blocks.values())
    assert all(torch.equal(a, b) for a, b in zip(alone, blocks, strict=True))
    inline = eager(cache, embeds)[1]
    assert not all(torch.equal(a, b) for a, b in zip(inline, blocks, strict=True))
