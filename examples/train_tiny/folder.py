# SPDX-License-Identifier: Apache-2.0
"""The model, and its folder on disk: one that `livevlm.load` and transformers read."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from livevlm.checkpoint import TINY
from livevlm.synthetic import FRAME_SIZE, FULL_VOCAB
from words import ID

VOCAB_SIZE = 80
"""Rows of the embedding: the words, rounded up to a multiple of 16."""
SHARED = ("chat_template.jinja", "livevlm_config.json", "tokenizer_config.json", "video_preprocessor_config.json")
"""Files that are the embedded checkpoint's own."""


def build_model() -> Any:
    """The model with random weights in float32; enlarge it here."""
    vision = SiglipVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=FRAME_SIZE,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=ID["<|im_start|>"], eos_token_id=ID["<|im_end|>"], pad_token_id=ID["<pad>"],
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=ID["<image>"], video_token_index=ID["<video>"],
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
        image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def save(model: Any, folder: Path) -> None:
    """Writes weights in bfloat16 with all that belongs to them; an older model in the folder is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / ".saving"  # whoever stops the process finds a whole file
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(staging)
    for path in staging.iterdir():
        path.chmod(0o644)
        path.replace(folder / path.name)
    staging.rmdir()
    for name in SHARED:
        shutil.copyfile(TINY / name, folder / name)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = ID
    text = json.dumps(tokenizer, indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


assert len(FULL_VOCAB) <= VOCAB_SIZE
