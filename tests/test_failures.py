# SPDX-License-Identifier: Apache-2.0
"""What a failure leaves behind: a usable model, the memory as it was, or an error that says so."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import livevlm.memory
import livevlm.policies.similarity
from livevlm import Config, LiveCache, QuestionError, StateError
from livevlm.policies import POLICIES
from streams import PROMPT, QUESTION, pixels, times, tiny_random
from test_generate import FULL, GREEDY, filled, full_ids, one_shot

BOUNDED = sorted(set(POLICIES) - {"full"})


def running(policy: str = "recent", model: Any = None) -> LiveCache:
    cache = LiveCache(model or tiny_random(), Config(policy=policy, budget=42, retrieval="none", clip_frames=6))
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(24), times(24))
    return cache


def content(cache: LiveCache) -> list[torch.Tensor]:
    memory = cache.memory
    return [t[:, : memory.video_end].clone() for t in memory.tensors] + [cache.queries.q.clone()]


def same(cache: LiveCache, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(content(cache), before, strict=True))


def answer(cache: LiveCache) -> torch.Tensor:
    return cache.adapter.model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_break_inside_the_model_leaves_model_and_stream_usable(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_random()
    cache = running(model=model)
    before, expected, stock = content(cache), answer(cache), one_shot(model, 3)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise stop

    for action in (lambda: cache.push(pixels(2), times(2, 24)), lambda: answer(cache)):
        with monkeypatch.context() as patch:
            patch.setattr(cache.adapter.language_model.layers[1].mlp, "forward", fail)
            with pytest.raises(stop):
                action()
        assert model.config.text_config._attn_implementation == "sdpa"
        assert torch.equal(one_shot(model, 3), stock), "stock use is untouched"
        assert same(cache, before)
        assert torch.equal(answer(cache), expected)
    cache.push(pixels(2), times(2, 24))
    assert cache.num_frames == 26


def out_of_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("no more")


@pytest.mark.parametrize("policy", BOUNDED)
def test_running_out_of_memory_while_compressing_loses_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = running(policy)
    before, expected = content(cache), answer(cache)
    first_move: dict[str, tuple[Any, str]] = {
        "similarity": (livevlm.policies.similarity, "evict_similar"),
        "clip_merge": (cache.memory, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*first_move.get(policy, (livevlm.memory, "compact_tokens")), out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match=r"clip of 6 frames .* nothing was lost: no more"):
            cache.push(pixels(6), times(6, 24))
    assert same(cache, before) and cache.num_frames == 24
    assert torch.equal(answer(cache), expected)
    cache.push(pixels(6), times(6, 24))
    assert cache.memory.num_video_tokens == 42


@pytest.mark.parametrize("policy", sorted(set(BOUNDED) - {"clip_merge"}))  # that one does not compact
def test_an_interrupt_while_tokens_move_is_not_hidden(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = running(policy)
    where: Any = livevlm.policies.similarity if policy == "similarity" else livevlm.memory
    op = "evict_similar" if policy == "similarity" else "compact_tokens"
    moving = getattr(where, op)

    def torn(*args: Any, tensors: Any = None, **kwargs: Any) -> None:
        moving(*args, **kwargs) if policy == "similarity" else moving(
            args[0][:1], args[1]
        )  # not all that belongs together
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, op, torn)
        with pytest.raises(KeyboardInterrupt):
            cache.push(pixels(6), times(6, 24))
    for call in (lambda: answer(cache), lambda: cache.push(pixels(1), times(1, 30))):
        with pytest.raises(StateError, match=r"call reset\(\)"):
            call()
    cache.reset()
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(24), times(24))
    assert torch.equal(answer(cache), answer(running(policy)))


def test_growing_without_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = running("full")
    before, zeros, room = content(cache), torch.zeros, [0]

    def limited(*args: Any, **kwargs: Any) -> torch.Tensor:
        if args[0][1] > room[0]:
            raise torch.OutOfMemoryError("no more")
        return zeros(*args, **kwargs)

    slots = cache.memory.num_slots
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", limited)
        with pytest.raises(torch.OutOfMemoryError, match=r"no room for 1\d\d\d tokens .* and stay"):
            cache.memory.reserve(1000)
        assert same(cache, before) and cache.memory.num_slots == slots
        room[0] = 1280  # less than half as much again
        cache.memory.reserve(1000)
    assert same(cache, before) and slots < cache.memory.num_slots <= 1280


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_growing_that_fails_changes_nothing(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = running("full")
    before, zeros, calls = content(cache), torch.zeros, []

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fail)
        with pytest.raises(error):
            cache.memory.reserve(10_000)
    assert same(cache, before)
    cache.memory.reserve(10_000)
    assert same(cache, before)


def test_a_prompt_that_fails_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LiveCache(tiny_random(), FULL)
    with monkeypatch.context() as patch:
        patch.setattr(cache.memory, "commit_prompt", lambda: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            cache.prefill_prompt(PROMPT)
    cache.prefill_prompt(PROMPT)
    assert cache.memory.num_prompt_tokens == len(PROMPT)


def test_asking_while_another_thread_pushes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = running("similarity")
    inside, go_on, expected = threading.Event(), threading.Event(), running("similarity")
    expected.push(pixels(6), times(6, 24))
    compress = cache.policy.compress

    def slow(*args: Any) -> None:
        inside.set()
        assert go_on.wait(20)
        compress(*args)

    monkeypatch.setattr(cache.policy, "compress", slow)
    thread = threading.Thread(target=cache.push, args=(pixels(6), times(6, 24)))
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(StateError, match="another thread is reading frames"):
            answer(cache)
        with pytest.raises(StateError, match="another thread is reading frames"):
            cache.push(pixels(1), times(1, 30))
    finally:
        go_on.set()
        thread.join()
    assert same(cache, content(expected))


def test_copies_and_pickles_of_an_attached_model() -> None:
    model = tiny_random()
    expected = answer(filled(model, 3))
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(answer(filled(loaded, 3)), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.copy_(twin.lm_head.weight.flip(0))
    assert not torch.equal(one_shot(twin, 3), one_shot(model, 3)), "the copy runs its own weights"
    assert not torch.equal(answer(filled(twin, 3)), expected)
    assert torch.equal(answer(filled(model, 3)), expected)


def test_inference_mode_inside_and_outside() -> None:
    model = tiny_random()
    with torch.inference_mode():
        cache = filled(model, 3)
        cache.memory.reserve(10_000)
        first = answer(cache)
    cache.push(pixels(3), times(3, 3))
    assert torch.equal(first[0, 7:], one_shot(model, 3))
    answer(cache)


def test_autograd_does_not_pile_up_in_the_memory() -> None:
    cache = filled(tiny_random(), 2)
    for _ in range(2):
        cache.adapter.model(input_ids=QUESTION[None], past_key_values=cache)
        cache.end_question()
    assert not cache.memory.k.requires_grad


def test_a_failed_call_by_hand_leaves_no_question_open() -> None:
    cache = filled(tiny_random(), 2)
    with pytest.raises(QuestionError, match="batch size 2"):
        cache.adapter.model(input_ids=QUESTION.repeat(2, 1), past_key_values=cache)
    cache.push(pixels(1), times(1, 2))


def test_a_refused_generate_has_pushed_nothing() -> None:
    model = tiny_random()
    cache = LiveCache(model, FULL)
    inputs = {"input_ids": full_ids(6), "pixel_values_videos": pixels(6)[None], "past_key_values": cache}
    with pytest.raises(ValueError, match="foo"):
        model.generate(**inputs, foo=1)
    with pytest.raises(QuestionError, match="num_beams=2"):
        model.generate(**inputs, generation_config=GenerationConfig(num_beams=2))
    assert cache.num_frames == 0 and cache.memory.num_tokens == 0
    cache.prefill_prompt(PROMPT)
    with pytest.raises(ValueError, match="foo"):
        model.generate(**inputs, foo=1)
    assert cache.num_frames == 0 and cache.memory.num_prompt_tokens == len(PROMPT), "the prompt stays"
    got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got[0, full_ids(6).shape[1] :], one_shot(model, 6))
    with pytest.raises(QuestionError, match="watched 6 frames already"):
        model.generate(**inputs, **GREEDY)


def test_lengths_count_the_whole_prompt_as_stock_does() -> None:
    model = tiny_random()
    length = full_ids(6).shape[1]
    for settings in (GenerationConfig(max_length=length + 5, eos_token_id=96), GenerationConfig(max_new_tokens=5)):
        cache, given = LiveCache(model, FULL), settings.to_dict()
        inputs = {"input_ids": full_ids(6), "pixel_values_videos": pixels(6)[None]}
        got = model.generate(**inputs, past_key_values=cache, generation_config=settings)
        assert torch.equal(got[0, length:], one_shot(model, 6)[:5])
        assert settings.to_dict() == given, "the caller's settings are left alone"
