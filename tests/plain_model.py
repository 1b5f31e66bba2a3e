# SPDX-License-Identifier: Apache-2.0
"""Answers of the small checkpoint with its full cache, through transformers alone: the reference for tests."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

CHECKPOINT = Path(__file__).parents[1] / "python" / "livevlm" / "tiny-onevision"


@lru_cache(maxsize=1)
def load() -> tuple[Any, Any]:
    """Return (model in float32 on the CPU, tokenizer)."""
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


@torch.inference_mode()
def answers(frames: torch.Tensor, questions: Sequence[tuple[str, int]]) -> list[str]:
    """Answer (question, number of frames seen) pairs about a video, uint8 [F, 3, H, W] RGB."""
    from transformers import DynamicCache

    model, tokenizer = load()
    size = (model.config.vision_config.image_size,) * 2
    pixels = F.interpolate(frames, size=size, mode="bicubic", antialias=True).float()
    pixels = (pixels / 255 - 0.5) / 0.5
    features = model.model.get_video_features(pixels[None]).pooler_output[0]
    tokens_per_frame = len(features) // len(frames)
    embed = model.get_input_embeddings()

    by_frame = defaultdict(list)
    for index, (_, seen) in enumerate(questions):
        by_frame[seen].append(index)
    result = [""] * len(questions)
    for seen, indices in by_frame.items():
        cache = None
        for index in indices:
            content = [{"type": "video"}, {"type": "text", "text": questions[index][0]}]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
            )
            video_at = prompt.index(model.config.video_token_index)
            if cache is None:
                cache = DynamicCache(config=model.config.text_config)
                prefix = embed(torch.tensor(prompt[:video_at]))
                video = torch.cat([prefix, features[: seen * tokens_per_frame]])
                model.model.language_model(inputs_embeds=video[None], past_key_values=cache)
            newline = model.model.image_newline[None]
            question = torch.cat([newline, embed(torch.tensor(prompt[video_at + 1 :]))])
            logits = model(inputs_embeds=question[None], past_key_values=copy.deepcopy(cache)).logits
            result[index] = tokenizer.decode([int(logits[0, -1].argmax())])
    return result
