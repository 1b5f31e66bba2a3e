# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision as transformers 5.17 builds it: SigLIP, a projector, 2x2 pooling and Qwen2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from livevlm.errors import ModelError
from livevlm.memory import KVShape
from livevlm.models.vision import Vision


class LlavaOnevisionAdapter:
    """What a stream needs of a `LlavaOnevisionForConditionalGeneration`: 0.5B, 7B, 72B and any other size."""

    def __init__(self, model: nn.Module) -> None:
        inner: Any = getattr(model, "model", None)
        parts = ("vision_tower", "multi_modal_projector", "language_model", "image_newline")
        missing = [name for name in parts if not hasattr(inner, name)]
        if missing or not hasattr(model, "lm_head"):
            raise ModelError(
                f"{type(model).__name__} is not a LlavaOnevisionForConditionalGeneration: it lacks "
                f"{', '.join(missing) or 'lm_head'}"
            )
        self.model: Any = model
        self.inner = inner
        self.language_model: Any = inner.language_model
        config: Any = model.config
        text, vision = config.text_config, config.vision_config
        layers = getattr(text, "layer_types", None) or []
        if any(kind != "full_attention" for kind in layers):
            raise ModelError(f"layer types {sorted(set(layers))} are not supported; only full_attention is")
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.num_layers: int = text.num_hidden_layers
        self.num_qo_heads: int = text.num_attention_heads
        self.num_kv_heads: int = text.num_key_value_heads
        self.video_token_id: int = config.video_token_id
        self.image_token_id: int = config.image_token_id
        self.image_size: int = vision.image_size
        self.tokens_per_frame: int = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        devices = {str(weight.device) for weight in self.language_model.parameters()}
        if len(devices) > 1:
            raise ModelError(f"the language model is spread over {', '.join(sorted(devices))}; one device is supported")
        self._vision: Vision | None = None

    @property
    def device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.get_input_embeddings().weight.dtype

    def kv_shape(self) -> KVShape:
        return KVShape(self.num_layers, self.num_qo_heads, self.num_kv_heads, self.head_dim, self.dtype, self.device)

    def embed_frames(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels `[num_frames, 3, image_size, image_size]` -> `[num_frames * tokens_per_frame, hidden]`."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        features = self.vision().embed(pixel_values)
        # Later versions of transformers let get_video_features append the newline that ends a video: not wanted yet.
        return features.reshape(-1, features.shape[-1])[: pixel_values.shape[0] * self.tokens_per_frame]

    def vision(self) -> Vision:
        """How frames are embedded; another object if modules, weights, hooks or settings are not what they were."""
        if self._vision is None or not self._vision.unchanged():
            self._vision = Vision(self.inner)
        return self._vision

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids `[num_tokens]` -> `[num_tokens, hidden]`."""
        return self.language_model.get_input_embeddings()(token_ids.to(self.device))

    def embed_question(self, token_ids: Tensor) -> Tensor:
        """What follows the video: the newline that ends every video, then the text; `[1 + num_tokens, hidden]`."""
        newline = self.inner.image_newline.to(self.device, self.dtype)
        return torch.cat((newline[None], self.embed_tokens(token_ids)))

    def embed_rows(self, token_ids: Tensor, after_video: Tensor) -> Tensor:
        """Token ids `[num_rows]` -> `[num_rows, hidden]`. The first one stands for the newline that ends every video
        where `after_video`, `[1]` on the device, is not zero."""
        rows = self.embed_tokens(token_ids)
        rows[:1] = torch.where(after_video.bool(), self.inner.image_newline.to(self.device, self.dtype), rows[:1])
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def decoder_layers(self) -> list[Any]:
        """The language model's layers, for `livevlm.decoder`, which calls what they hold instead of the layers.

        Raises:
            ModelError: a layer is of another class than transformers' Qwen2 and may compute something else.
        """
        layers, model = list(self.language_model.layers), self.language_model
        config, norm = model.config, "Qwen2RMSNorm"
        if getattr(config, "hidden_act", None) != "silu":
            raise ModelError(f"hidden_act={getattr(config, 'hidden_act', None)!r} is not silu")
        parts = [(model.norm, norm), *((layer, "Qwen2DecoderLayer") for layer in layers)]
        for layer in layers:
            parts += [(layer.self_attn, "Qwen2Attention"), (layer.mlp, "Qwen2MLP")]
            parts += [(layer.input_layernorm, norm), (layer.post_attention_layernorm, norm)]
        for part, expected in parts:
            if type(part).__name__ != expected:
                raise ModelError(f"a {type(part).__name__} stands for a {expected}")
        return layers
