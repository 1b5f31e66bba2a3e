# SPDX-License-Identifier: Apache-2.0
"""`model.generate(..., past_key_values=LiveCache)`: every way in is right or refused, none is silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaOnevisionForConditionalGeneration

from livevlm import Config, LiveCache, QuestionError, StateError
from streams import PROMPT, QUESTION, pixels, times, tiny_random

FULL = Config(policy="full", retrieval="none")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 96}


@pytest.fixture(scope="module")
def model() -> LlavaOnevisionForConditionalGeneration:
    return tiny_random()


def full_ids(num_frames: int) -> torch.Tensor:
    return torch.cat((PROMPT, torch.full((num_frames * 4 + 1,), 96), QUESTION))[None]


def one_shot(model: LlavaOnevisionForConditionalGeneration, num_frames: int) -> torch.Tensor:
    """The answer of stock generate to the whole prompt at once."""
    ids = full_ids(num_frames)
    cache = DynamicCache(config=model.config.get_text_config())
    out = model.generate(input_ids=ids, pixel_values_videos=pixels(num_frames)[None], past_key_values=cache, **GREEDY)
    return out[0, ids.shape[1] :]


def filled(model: LlavaOnevisionForConditionalGeneration, num_frames: int, config: Config = FULL) -> LiveCache:
    cache = LiveCache(model, config)
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(num_frames), times(num_frames))
    return cache


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 6, 12])  # fewer and more tokens than the question has
def test_every_route_equals_one_shot(model: LlavaOnevisionForConditionalGeneration, num_frames: int) -> None:
    expected = one_shot(model, num_frames)
    cache = filled(model, num_frames)
    ids = QUESTION[None]
    embeds = cache.adapter.embed_question(QUESTION)[None]
    routes: dict[str, dict[str, Any]] = {
        "ids": {"input_ids": ids},
        "ids and mask": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "embeds": {"inputs_embeds": embeds},
        "embeds and mask": {"inputs_embeds": embeds, "attention_mask": torch.ones(1, embeds.shape[1])},
        "max_length": {"input_ids": ids, "max_length": ids.shape[1] + 8, "max_new_tokens": None},
    }
    for name, route in routes.items():
        got = model.generate(past_key_values=cache, **{**GREEDY, **route})
        start = ids.shape[1] if "input_ids" in route else 0
        assert torch.equal(got[0, start:], expected), name


def test_drop_in_with_the_whole_prompt(model: LlavaOnevisionForConditionalGeneration) -> None:
    """What a user's code already does: one call with text and video together. Then more questions, and more video."""
    cache = LiveCache(model, FULL)
    inputs = {"input_ids": full_ids(12), "pixel_values_videos": pixels(12)[None]}
    got = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(got[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(got[0, inputs["input_ids"].shape[1] :], one_shot(model, 12))
    again = model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)
    assert torch.equal(again[0, len(QUESTION) :], one_shot(model, 12))
    assert cache.num_frames == 12 and cache.get_seq_length() == 0


def test_sampling_and_outputs(model: LlavaOnevisionForConditionalGeneration) -> None:
    cache = filled(model, 5)
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 6, "eos_token_id": 96}
    out = model.generate(
        input_ids=QUESTION[None], past_key_values=cache, return_dict_in_generate=True, output_scores=True, **options
    )
    assert out.sequences.shape[1] == len(QUESTION) + 6
    assert len(out.scores) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "attention_mask hides tokens"),
        ({"input_ids": QUESTION.repeat(2, 1)}, "batch size 2"),
        ({"input_ids": full_ids(2)}, "pixel_values_videos is missing"),
        ({"input_ids": full_ids(2), "pixel_values_videos": pixels(3)[None]}, "3 frames need 13"),
        ({"input_ids": full_ids(2)[:, :-7], "pixel_values_videos": pixels(2)[None]}, "no question"),
        ({"input_ids": torch.tensor([[95, 3]])}, "image tokens"),
        ({"pixel_values": pixels(1)}, "only videos"),
        ({"position_ids": torch.arange(7)[None]}, "positions follow"),
        ({"inputs_embeds": torch.zeros(1, 2, 224)}, "exactly one of"),
    ],
)
def test_what_cannot_work_is_refused(
    model: LlavaOnevisionForConditionalGeneration, arguments: dict[str, Any], says: str
) -> None:
    cache = filled(model, 2)
    expected = model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)
    with pytest.raises(QuestionError, match=says):
        model.generate(**{"input_ids": QUESTION[None], "past_key_values": cache, **GREEDY, **arguments})
    again = model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)
    assert torch.equal(again, expected), "the stream is as usable as before"


def test_wrong_use_of_the_cache_is_an_error(model: LlavaOnevisionForConditionalGeneration) -> None:
    cache, other = filled(model, 2), tiny_random()
    with pytest.raises(StateError, match="not made for"):
        other(input_ids=QUESTION[None], past_key_values=cache)
    LiveCache(other, FULL)  # now it has hooks, and they know whose cache it is
    with pytest.raises(StateError, match="another model"):
        other(input_ids=QUESTION[None], past_key_values=cache)
    with pytest.raises(StateError, match="no frame"):
        model.generate(input_ids=QUESTION[None], past_key_values=LiveCache(model, FULL), **GREEDY)
    with pytest.raises(StateError, match="prompt before the video"):
        cache.prefill_prompt(PROMPT + 1)
    for call in (cache.crop, cache.reorder_cache, cache.batch_repeat_interleave, cache.batch_select_indices):
        with pytest.raises(StateError):
            call(1)
    assert torch.equal(
        model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)[0, 7:], one_shot(model, 2)
    )


def test_calling_the_model_by_hand(model: LlavaOnevisionForConditionalGeneration) -> None:
    """model(...) with a LiveCache opens a question, which lasts until end_question."""
    cache = filled(model, 6)
    embeds = cache.adapter.embed_question(QUESTION)[None]
    with torch.no_grad():
        first = model(inputs_embeds=embeds[:, :3], past_key_values=cache).logits
        rest = model(inputs_embeds=embeds[:, 3:], past_key_values=cache).logits
        cache.end_question()
        whole = model(inputs_embeds=embeds, past_key_values=cache).logits
        cache.end_question()
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-5, rtol=1e-4)
    cache.push(pixels(1), times(1, 6))
    assert cache.num_frames == 7


def test_reset(model: LlavaOnevisionForConditionalGeneration) -> None:
    cache = filled(model, 3)
    cache.reset()
    assert cache.num_frames == 0 and cache.memory.num_tokens == 0
    cache.prefill_prompt(PROMPT)
    cache.push(pixels(2), times(2))
    got = model.generate(input_ids=QUESTION[None], past_key_values=cache, **GREEDY)
    assert torch.equal(got[0, 7:], one_shot(model, 2))
