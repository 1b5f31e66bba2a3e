# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision as transformers 5.17 builds it: SigLIP, a projector, 2x2 pooling and Qwen2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from livevlm.errors import ModelError
from livevlm.memory import KVShape

VISION_FRAMES = 8  # on a GPU, more at once are not faster a frame, but take more memory


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
        self._compiled: list[Any] = []
        self._lean = config.vision_feature_layer == -1 and config.vision_feature_select_strategy == "full"

    @property
    def device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.get_input_embeddings().weight.dtype

    def kv_shape(self) -> KVShape:
        return KVShape(self.num_layers, self.num_qo_heads, self.num_kv_heads, self.head_dim, self.dtype, self.device)

    def embed_frames(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels `[num_frames, 3, image_size, image_size]` -> `[num_frames * tokens_per_frame, hidden]`.

        The lean path is bit-equal to `get_video_features` without keeping every hidden state of the vision tower
        (45 MB a frame at the 7B shape); checkpoints that read another layer take the stock path.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        if self._lean:
            at_once = VISION_FRAMES if pixel_values.is_cuda else pixel_values.shape[0]
            parts = [self._features(part) for part in pixel_values.split(at_once)]
            features = torch.cat(parts) if len(parts) > 1 else parts[0]
        else:
            features = self.inner.get_video_features(pixel_values[None]).pooler_output
        # Later versions of transformers let get_video_features append the newline that ends a video: not wanted yet.
        return features.reshape(-1, features.shape[-1])[: pixel_values.shape[0] * self.tokens_per_frame]

    def _features(self, pixel_values: Tensor) -> Tensor:
        """The lean path: `[num_frames, tokens_per_frame, hidden]`."""
        tower = self.inner.vision_tower
        if not self._compiled:
            hidden = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
            return self._project(hidden)
        first, *layers, last = self._compiled
        hidden = first(pixel_values)
        for layer in layers:
            hidden = layer(hidden, None)
        return last(hidden)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.inner.apply_pooling(self.inner.multi_modal_projector(hidden))

    @property
    def is_compiled(self) -> bool:
        return bool(self._compiled)

    def compile_vision(self) -> None:
        """From now on the vision tower of this adapter runs compiled; the model itself is left as it is.

        Layer by layer: all layers are one piece of code, which is compiled once.
        """
        tower = self.inner.vision_tower
        parts = (tower.embeddings, *tower.encoder.layers, self._project)
        self._compiled = [torch.compile(part) for part in parts] if self._lean else []

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids `[num_tokens]` -> `[num_tokens, hidden]`."""
        return self.language_model.get_input_embeddings()(token_ids.to(self.device))

    def embed_question(self, token_ids: Tensor) -> Tensor:
        """What follows the video: the newline that ends every video, then the text; `[1 + num_tokens, hidden]`."""
        newline = self.inner.image_newline.to(self.device, self.dtype)
        return torch.cat((newline[None], self.embed_tokens(token_ids)))

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
