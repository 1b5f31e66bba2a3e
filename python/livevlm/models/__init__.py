# SPDX-License-Identifier: Apache-2.0
"""Adapters: all that livevlm knows about a model family. One file a family."""

from __future__ import annotations

from torch import nn

from livevlm.errors import ModelError
from livevlm.models.llava_onevision import LlavaOnevisionAdapter

ADAPTERS = {"llava_onevision": LlavaOnevisionAdapter}


def adapter_for(model: nn.Module) -> LlavaOnevisionAdapter:
    """The adapter of a transformers model.

    Raises:
        ModelError: no adapter for this family.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in ADAPTERS:
        raise ModelError(
            f"model of type {family or type(model).__name__!r} is not supported; supported: {', '.join(ADAPTERS)}"
        )
    return ADAPTERS[family](model)


__all__ = ["ADAPTERS", "LlavaOnevisionAdapter", "adapter_for"]
