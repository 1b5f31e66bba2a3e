# SPDX-License-Identifier: Apache-2.0
"""From pixels to a frame's tokens: vision tower, projector, pooling; by hand on a GPU, where all of it is known."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from livevlm.models import siglip
from livevlm.watched import Watched

AT_ONCE = 8  # frames; on a GPU, more are not faster a frame, but take more memory


class Vision:
    """How a LLaVA-OneVision model sees, as the model is now.

    - By hand: `siglip.hidden_states`, `project_and_pool`. The same up to rounding, and faster. For 16-bit models on a
      GPU: elsewhere modules give the bits that transformers gives.
    - By modules: one after the other, which is bit-equal to `get_video_features` but does not keep the hidden states of
      all layers (45 MB a frame at the 7B shape).
    - By `get_video_features`, for checkpoints that read another layer than the last.

    Attributes:
        hooked: why what it launches cannot be replayed: hooks on a module. Else empty.
        why_modules: why it does not compute by hand; empty if it does.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._watched = Watched((inner.vision_tower, inner.multi_modal_projector))
        self._facts = self._now()
        self.hooked = self._watched.hooked
        self._last_layer = self._facts[2:4] == (-1, "full")
        self.why_modules = self._why_modules()
        self._pooling: Tensor | None = None
        if not self.why_modules:
            first = next(inner.vision_tower.parameters())
            self._pooling = pooling_matrix(_side(inner), first.dtype, first.device)

    def _now(self) -> tuple[object, ...]:
        """What modules do not tell."""
        inner, config = self._inner, self._inner.config
        tower = inner.vision_tower
        first = next(tower.parameters())
        attention = getattr(tower.config, "_attn_implementation", None)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        return first.dtype, attention, layer, strategy, "apply_pooling" in inner.__dict__

    def _why_modules(self) -> str:
        first = next(self._inner.vision_tower.parameters())
        if first.device.type != "cuda":
            return first.device.type
        if first.dtype.itemsize != 2:
            return str(first.dtype).removeprefix("torch.")  # cuDNN and cuBLAS do not even agree on whether to use TF32
        return self.hooked or unknown(self._inner)

    @property
    def said(self) -> str:
        return f"modules: {self.why_modules}" if self.why_modules else "by hand"

    def unchanged(self) -> bool:
        """Whether all this still holds; it takes some microseconds a layer."""
        return self._facts == self._now() and self._watched.unchanged()

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[num_frames, 3, image_size, image_size]` -> `[num_frames, tokens_per_frame, hidden]`."""
        if not self._last_layer:
            return self._inner.get_video_features(pixels[None]).pooler_output
        parts = [self._few(part) for part in pixels.split(AT_ONCE if pixels.is_cuda else pixels.shape[0])]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _few(self, pixels: Tensor) -> Tensor:
        inner, tower = self._inner, self._inner.vision_tower
        # What is done by hand has no gradient, and would not be cast where autocast wants it to be.
        if self._pooling is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            hidden = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
            return inner.apply_pooling(inner.multi_modal_projector(hidden))
        return project_and_pool(inner.multi_modal_projector, siglip.hidden_states(tower, pixels), self._pooling)


def unknown(inner: Any) -> str:
    """What keeps a LlavaOnevisionModel from being computed by hand; empty if nothing does."""
    config, tower, projector = inner.config, inner.vision_tower, inner.multi_modal_projector
    if (config.vision_feature_layer, config.vision_feature_select_strategy) != (-1, "full"):
        return f"vision_feature_layer={config.vision_feature_layer}, {config.vision_feature_select_strategy!r}"
    for part, expected in ((inner, "LlavaOnevisionModel"), (projector, "LlavaOnevisionMultiModalProjector")):
        if type(part).__name__ != expected:
            return f"a {type(part).__name__} stands for a {expected}"
    if "apply_pooling" in inner.__dict__:
        return "apply_pooling was exchanged"
    for linear in (projector.linear_1, projector.linear_2):
        if type(linear) is not nn.Linear:
            return f"a {type(linear).__name__} stands for a Linear"
    first = next(tower.parameters())
    for weight in (*tower.parameters(), *projector.parameters()):
        # Quantised weights are of other classes: they are more than their numbers.
        if type(weight) is not nn.Parameter or (weight.dtype, weight.device) != (first.dtype, first.device):
            return "weights differ in kind, dtype or device"
    return siglip.unknown(tower)


def _side(inner: Any) -> int:
    """Patches a side."""
    vision = inner.config.vision_config
    return vision.image_size // vision.patch_size


def pooling_matrix(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transformers model's `apply_pooling` as a matrix `[tokens_per_frame, side * side]`: half as many a side.

    A row holds the weights of the four patches that bilinear interpolation takes a token from: they are what it makes
    of images with a single patch. Its kernel for 16-bit tensors on a GPU is much slower than the product.

    Sums are float32 in both, and rounded once. Weights are rounded here, to u = 2^-8 in bfloat16, 2^-11 in float16;
    they add up to one, so a token is off by at most u times the largest of its patches, no more than by the rounding.
    """
    with torch.no_grad():
        images = torch.eye(side * side, device=device).view(-1, 1, side, side)
        half = math.ceil(side / 2)
        pooled = F.interpolate(images, size=(half, half), mode="bilinear")
        return pooled.flatten(1).t().contiguous().to(dtype)


def project_and_pool(projector: Any, hidden: Tensor, pooling: Tensor) -> Tensor:
    """`apply_pooling(projector(hidden))`, up to rounding.

    Pooling goes before the second product, which is linear, and so has a quarter of the rows.
    """
    return projector.linear_2(torch.matmul(pooling, projector.act(projector.linear_1(hidden))))
