# SPDX-License-Identifier: Apache-2.0
"""The decoder layers whose weights captured passes refer to."""

from __future__ import annotations

from typing import Any

from livevlm.errors import ModelError
from livevlm.models import LlavaOnevisionAdapter
from livevlm.watched import Watched


class Layers:
    """A language model's decoder layers.

    Attributes:
        all: the layers, first to last.
        first, rest: `all` in two parts: a pass begins with the first ones while the host looks at the others.

    Raises:
        ModelError: the adapter knows no such layers, or hooks watch over a module.
    """

    def __init__(self, adapter: LlavaOnevisionAdapter) -> None:
        self.all: list[Any] = adapter.decoder_layers()
        count = max(1, len(self.all) // 6)  # busy for long enough, and soon looked at
        self.first, self.rest = self.all[:count], self.all[count:]
        self._first = Watched((adapter.language_model.get_input_embeddings(), *self.first))
        self._rest = Watched((*self.rest, adapter.language_model.norm, adapter.model.lm_head))
        hooked = self._first.hooked or self._rest.hooked
        if hooked:
            raise ModelError(hooked)

    def first_unchanged(self) -> bool:
        """Whether modules and weights' addresses of the first layers are what they were, without hooks."""
        return self._first.unchanged()

    def rest_unchanged(self) -> bool:
        return self._rest.unchanged()

    def unchanged(self) -> bool:
        return self.first_unchanged() and self.rest_unchanged()
