# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights, and pixels for it: what tests of streams are made from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

PROMPT = torch.tensor([2, 7, 9])
QUESTION = torch.tensor([11, 30, 12, 25, 3, 2, 8])


def tiny_random(dtype: torch.dtype = torch.float32, *, kv_heads: int = 2) -> LlavaOnevisionForConditionalGeneration:
    """Random weights, three layers, group size 7, four tokens a frame."""
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": 97, "hidden_size": 14 * 16, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 14, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
        },
        image_token_index=95, video_token_index=96, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype)
    # Random weights of the usual scale hardly attend to anything in particular: larger ones make order matter.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and weight.dim() == 2:
                weight.mul_(3)
        model.model.image_newline.normal_()
    return model.eval()


def pixels(num_frames: int, seed: int = 1) -> Tensor:
    return torch.randn(num_frames, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def times(num_frames: int, start: float = 0.0) -> Tensor:
    return torch.arange(num_frames, dtype=torch.float64) + start


# hidden, feed-forward, layers, query heads, KV heads, head_dim -> bytes of keys and values of one token in 16 bits
REAL_SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 64, 12_288),
    "7B": (3584, 18944, 28, 28, 4, 128, 57_344),
    "72B": (8192, 29568, 80, 64, 8, 128, 327_680),
}


def real_config(name: str) -> LlavaOnevisionConfig:
    """The configuration of a published LLaVA-OneVision size."""
    hidden, ffn, layers, heads, kv_heads, _, _ = REAL_SIZES[name]
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": 152_000, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        },
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
