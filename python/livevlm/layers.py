# SPDX-License-Identifier: Apache-2.0
"""The modules whose weights captured passes refer to, and whether they are still the same ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from livevlm.errors import ModelError
from livevlm.models import LlavaOnevisionAdapter


class Layers:
    """A language model's decoder layers.

    Attributes:
        all: the layers, first to last.

    Raises:
        ModelError: the adapter knows no such layers, or hooks (or a method put in the place of `forward`) watch over a
            module: captured passes would not call them.
    """

    def __init__(self, adapter: LlavaOnevisionAdapter) -> None:
        self.all: list[Any] = adapter.decoder_layers()
        roots: list[nn.Module] = [adapter.language_model.get_input_embeddings(), adapter.language_model.norm]
        modules = [module for root in (*roots, adapter.model.lm_head, *self.all) for module in root.modules()]
        # Dictionaries that belong to modules: looking into these is many times faster than asking the modules.
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._weights = [(m._parameters, name) for m in modules for name, w in m._parameters.items() if w is not None]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        for module in modules:
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                raise ModelError(f"a {type(module).__name__} has hooks")
        self._addresses = self._where()

    def _where(self) -> list[int]:
        return [weights[name].data_ptr() for weights, name in self._weights]

    def unchanged(self) -> bool:
        """Whether modules and weights' addresses are what they were, without hooks; some microseconds a layer."""
        same = all(children.get(name) is child for children, name, child in self._children)
        hooked = any(self._hooks) or any("forward" in own for own in self._own)
        return same and not hooked and self._where() == self._addresses
