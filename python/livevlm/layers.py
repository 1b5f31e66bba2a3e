# SPDX-License-Identifier: Apache-2.0
"""The decoder layers whose weights captured passes refer to."""

from __future__ import annotations

from typing import Any

from torch import nn

from livevlm.errors import ModelError
from livevlm.models import LlavaOnevisionAdapter
from livevlm.watched import Watched


class Layers:
    """A language model's decoder layers.

    Attributes:
        all: the layers, first to last.

    Raises:
        ModelError: the adapter knows no such layers, or hooks watch over a module.
    """

    def __init__(self, adapter: LlavaOnevisionAdapter) -> None:
        self.all: list[Any] = adapter.decoder_layers()
        roots: list[nn.Module] = [adapter.language_model.get_input_embeddings(), adapter.language_model.norm]
        self._watched = Watched((*roots, adapter.model.lm_head, *self.all))
        if self._watched.hooked:
            raise ModelError(self._watched.hooked)

    def unchanged(self) -> bool:
        """Whether modules and weights' addresses are what they were, without hooks."""
        return self._watched.unchanged()
