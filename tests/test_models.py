# SPDX-License-Identifier: Apache-2.0
"""The LLaVA-OneVision adapter: real sizes, the lean vision path, pixels, prompts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionForConditionalGeneration

import livevlm
from livevlm import Config, LiveCache, Processor
from livevlm.errors import ModelError
from livevlm.models import adapter_for
from livevlm.processing import FALLBACK_TEMPLATE, QUESTION
from streams import REAL_SIZES, pixels, real_config, tiny_random


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes(name: str) -> None:
    _, _, layers, heads, kv_heads, head_dim, bytes_per_token = REAL_SIZES[name]
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration._from_config(real_config(name), dtype=torch.bfloat16)
    adapter = adapter_for(model)
    assert adapter.tokens_per_frame == 196
    shape = adapter.kv_shape()
    assert (shape.num_layers, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim) == (
        layers,
        heads,
        kv_heads,
        head_dim,
    )
    assert shape.bytes_per_token == bytes_per_token
    cache = LiveCache(model, Config(max_memory="1GiB"))
    assert cache.budget == 2**30 // bytes_per_token
    assert cache.memory.k.shape[0::2] == (layers, kv_heads)


def test_lean_vision_path_is_bit_equal() -> None:
    model = tiny_random()
    frames = pixels(5)
    with torch.no_grad():
        stock = model.model.get_video_features(frames[None]).pooler_output[0, : 5 * 4]
        assert torch.equal(adapter_for(model).embed_frames(frames), stock)
        model.config.vision_feature_layer = -2  # a checkpoint that reads another layer takes the stock path
        other = model.model.get_video_features(frames[None], vision_feature_layer=-2).pooler_output[0, : 5 * 4]
        assert torch.equal(adapter_for(model).embed_frames(frames), other)
        assert not torch.equal(stock, other)


def test_pixels_without_torchvision() -> None:
    """The stock video processor's arithmetic: antialiased bicubic on uint8, then scale and normalise."""
    frames = torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8)
    processor = livevlm.load("tiny", device="cpu").processor
    got = processor.pixels(frames, 56)
    resized = F.interpolate(frames, size=(56, 56), mode="bicubic", antialias=True)
    torch.testing.assert_close(got, resized.float() / 127.5 - 1, atol=1e-6, rtol=0)
    exact = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    torch.testing.assert_close(processor.pixels(exact, 56), exact.float() / 127.5 - 1, atol=1e-6, rtol=0)


@pytest.mark.cuda
def test_pixels_on_a_gpu_are_within_one_level() -> None:
    frames = torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8)
    processor = livevlm.load("tiny", device="cpu").processor
    cpu, gpu = processor.pixels(frames, 56), processor.pixels(frames.cuda(), 56)
    assert gpu.is_cuda
    assert (cpu - gpu.cpu()).abs().max() <= 1 / 127.5 + 1e-6


def test_prompt_is_the_chat_template_around_the_video() -> None:
    processor = livevlm.load("tiny", device="cpu").processor
    before, after = processor.prompt("what colour was the star ?")
    words = processor.tokenizer.convert_ids_to_tokens(before.tolist() + after.tolist())
    assert words == ["<|im_start|>", "user", "what", "colour", "was", "the", "star", "?", "<|im_end|>",
                     "<|im_start|>", "assistant"]  # fmt: skip
    assert len(before) == 2
    shouted, _ = processor.prompt("What COLOUR was the Star?")
    assert torch.equal(shouted, before)
    assert torch.equal(processor.prompt("What COLOUR was the Star?")[1], after)


def test_a_template_is_run_once_for_all_questions() -> None:
    processor = livevlm.load("tiny", device="cpu").processor
    for question in (" where was the star ? ", QUESTION, f"{QUESTION} {QUESTION}"):
        content = [{"type": "video"}, {"type": "text", "text": question.strip()}]
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=FALLBACK_TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )
        expected = [processor.tokenizer(part)["input_ids"] for part in text.split("<video>")]
        assert [ids.tolist() for ids in processor.prompt(question)] == expected
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }} <video>"
    with pytest.raises(ModelError, match=r"must place '<video>', then 'What happens\?'; it gave"):
        processor.prompt("where was the star ?")


def test_processors_of_any_kind() -> None:
    mine = livevlm.load("tiny", device="cpu").processor
    assert Processor.wrap(mine) is mine
    bare = Processor.wrap(mine.tokenizer)
    assert bare.mean == (0.5, 0.5, 0.5)

    class Stock:  # as LlavaOnevisionProcessor, which cannot be built without torchvision
        tokenizer = mine.tokenizer
        chat_template = FALLBACK_TEMPLATE

        class video_processor:
            image_mean = (0.1, 0.2, 0.3)
            image_std = (1.0, 1.0, 1.0)

    stock = Processor.wrap(Stock())
    assert stock.mean == (0.1, 0.2, 0.3)
    before, after = stock.prompt("where was the star ?")
    assert len(before) == 2 and len(after) == 8


def test_bf16_checkpoint_keeps_its_rotary_frequencies() -> None:
    """`.to(bf16)` would round them; loading must not."""
    model = livevlm.load("tiny", device="cpu", dtype=torch.bfloat16).model
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.bfloat16
