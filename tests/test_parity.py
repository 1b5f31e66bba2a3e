# SPDX-License-Identifier: Apache-2.0
"""With budget and retrieval switched off, a stream computes what stock transformers computes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from livevlm import Config, LiveCache
from livevlm.models import adapter_for
from streams import PROMPT, QUESTION, pixels, tiny_random

CLIPS = [1, 5, 7, 24]


def clip_sizes(clip: int, total: int = 24) -> list[int]:
    return [min(clip, total - start) for start in range(0, total, clip)]


def streamed(model: torch.nn.Module, frames: list[Tensor], config: Config, prompt: Tensor = PROMPT) -> Tensor:
    """Hidden states of the question after the clips were pushed, `[1, 1 + num_question_tokens, hidden]`."""
    cache = LiveCache(model, config)
    cache.prefill_prompt(prompt)
    for clip in frames:
        cache.push(clip, torch.zeros(len(clip), dtype=torch.float64))
    return ask(cache)


@torch.no_grad()
def ask(cache: LiveCache) -> Tensor:
    embeds = cache.adapter.embed_question(QUESTION)[None]
    with cache.question():
        return cache.adapter.language_model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state


@torch.no_grad()
def stock(model: torch.nn.Module, frames: list[Tensor]) -> Tensor:
    """The same through transformers alone: one forward pass a clip over a DynamicCache."""
    inner = model.model
    cache = DynamicCache(config=model.config.get_text_config())
    embeddings = inner.language_model.get_input_embeddings()

    def embed(token_ids: Tensor) -> Tensor:
        return embeddings(token_ids.to(embeddings.weight.device))

    parts = [embed(PROMPT)[None]]
    for clip in frames:
        features = inner.get_video_features(clip[None].to(model.dtype)).pooler_output
        parts += [features[:, : 4 * len(clip)]]  # later versions of transformers append the newline
    parts += [torch.cat((inner.image_newline[None], embed(QUESTION)))[None]]
    for part in parts:
        out = inner.language_model(inputs_embeds=part, past_key_values=cache, use_cache=True)
    return out.last_hidden_state


FULL = Config(policy="full", retrieval="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize("clip", CLIPS)
def test_equal_to_stock_chunked(clip: int, positions: str, dtype: torch.dtype) -> None:
    model = tiny_random(dtype)
    frames = list(pixels(24).split(clip_sizes(clip)))
    config = Config(policy="full", retrieval="none", positions=positions)
    got, expected = streamed(model, frames, config), stock(model, frames)
    if transformers.__version__.startswith("5.17."):
        assert torch.equal(got, expected)
    else:  # later versions call attention differently for some lengths: the same numbers, added in another order
        error = (got - expected).double().norm() / expected.double().norm()
        assert error < {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("clip", CLIPS)
def test_close_to_one_shot(clip: int) -> None:
    model = tiny_random()
    frames = pixels(24)
    ids = torch.cat((PROMPT, torch.full((24 * 4 + 1,), 96), QUESTION))[None]
    with torch.no_grad():
        one_shot = model.model(input_ids=ids, pixel_values_videos=frames[None]).last_hidden_state
    got = streamed(model, list(frames.split(clip_sizes(clip))), FULL)
    torch.testing.assert_close(got, one_shot[:, -got.shape[1] :], atol=2e-5, rtol=1e-4)


def test_a_clip_split_by_clip_frames_equals_pushing_the_parts() -> None:
    model, frames = tiny_random(), pixels(24)
    whole = streamed(model, [frames], Config(policy="full", retrieval="none", clip_frames=7))
    assert torch.equal(whole, streamed(model, list(frames.split(clip_sizes(7))), FULL))


def controls(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a broken stream would compute."""
    frames = list(pixels(24).split(clip_sizes(5)))
    no_rope = copy.deepcopy(model)  # hooks are made for one model: this one has none yet
    no_rope.model.language_model.rotary_emb.inv_freq.zero_()
    return {
        "no rotary embedding": streamed(no_rope, frames, FULL),
        "clips swapped": streamed(model, [frames[1], frames[0], *frames[2:]], FULL),
        "clip dropped": streamed(model, frames[:-1], FULL),
        "prompt dropped": streamed(model, frames, FULL, prompt=PROMPT[:0]),
    }


def test_the_comparison_notices_what_is_wrong() -> None:
    model = tiny_random()
    wrong = controls(copy.deepcopy(model))
    truth = stock(model, list(pixels(24).split(clip_sizes(5))))
    for name, hidden in wrong.items():
        assert (hidden - truth).abs().max() > 1e-2, name


def test_stock_use_of_an_attached_model_is_untouched() -> None:
    model = tiny_random()
    frames = list(pixels(24).split(clip_sizes(7)))
    before = stock(model, frames)
    cache = LiveCache(model, FULL)
    cache.push(frames[0], torch.zeros(7))
    assert torch.equal(stock(model, frames), before)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert adapter_for(model).language_model.rotary_emb.inv_freq is not None
