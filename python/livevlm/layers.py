# SPDX-License-Identifier: Apache-2.0
"""The modules whose weights captured passes refer to, and whether they are still the same ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from livevlm.models import LlavaOnevisionAdapter


class Layers:
    """A language model's decoder layers.

    Attributes:
        all: the layers, first to last.

    Raises:
        ModelError: see `decoder_layers` of the adapter.
    """

    def __init__(self, adapter: LlavaOnevisionAdapter) -> None:
        self.all: list[Any] = adapter.decoder_layers()
        roots: list[nn.Module] = [adapter.language_model.get_input_embeddings(), adapter.language_model.norm]
        modules = [module for root in (*roots, adapter.model.lm_head, *self.all) for module in root.modules()]
        # Dictionaries that belong to modules: looking into these is many times faster than asking the modules.
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._weights = [(m._parameters, name) for m in modules for name, w in m._parameters.items() if w is not None]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._methods = [m.__dict__ for m in modules]
        self._seen = self._state()

    def _state(self) -> tuple[list[int], list[int]]:
        # Where weights are, and how much watches over the modules.
        watched = [len(hooks) for hooks in self._hooks] + ["forward" in own for own in self._methods]
        return [weights[name].data_ptr() for weights, name in self._weights], watched

    def unchanged(self) -> bool:
        """Whether modules, weights' addresses and hooks are what they were; some microseconds a layer."""
        same = all(children.get(name) is child for children, name, child in self._children)
        return same and self._state() == self._seen
