# SPDX-License-Identifier: Apache-2.0
"""What is measured: a model of a published shape with random weights, the tiny one, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from livevlm.checkpoint import TINY, load
from livevlm.config import Config
from livevlm.errors import ConfigError
from livevlm.processing import Processor

# hidden, feed-forward, layers, query heads, KV heads, vocabulary, whether the embeddings are the output layer too
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 152_000, True),
    "7b": (3584, 18944, 28, 28, 4, 152_128, False),
}
QUESTION_TOKENS = 32


@dataclass
class Subject:
    """Attributes:
    weight_bytes: of the language model, all of which decoding reads for every token; without the input embeddings.
    question: text whose prompt, from the end of the video on, has `QUESTION_TOKENS` tokens (the tiny model's: fewer).
    """

    name: str
    model: Any
    processor: Processor
    config: Config
    weight_bytes: int
    question: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def question_ids(self) -> torch.Tensor:
        return self.processor.prompt(self.question)[1]


def subject_for(shape: str, model: str | None, device: str) -> Subject:
    """A checkpoint if `model` names one, else random weights of a shape (bfloat16, made on the device) or "tiny"."""
    if model is not None or shape == "tiny":
        checkpoint = load(model or "tiny", device=device)
        return _subject(Path(model).name if model else shape, *checkpoint)
    config = shape_config(shape)
    with torch.device(device):
        built = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    return _subject(shape, built, Processor.from_pretrained(TINY), Config())


def shape_config(shape: str) -> LlavaOnevisionConfig:
    if shape not in SHAPES:
        raise ConfigError(f"shape={shape!r} is unknown; allowed: tiny, {', '.join(SHAPES)}")
    hidden, ffn, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )


def _subject(name: str, model: Any, processor: Processor, config: Config) -> Subject:
    parts = (*model.model.language_model.layers.parameters(), *model.lm_head.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in parts)
    return Subject(name, model, processor, config, size, _question(processor))


def _question(processor: Processor) -> str:
    """Words until there are as many tokens as wanted; the newline that ends the video is one of them."""
    words = ["what"]
    while len(processor.prompt(" ".join([*words, "what", "?"]))[1]) < QUESTION_TOKENS:
        words.append("what")
    return " ".join([*words, "?"])
