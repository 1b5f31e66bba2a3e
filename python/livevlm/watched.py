# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights are used without calling the modules, and whether they are still the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# Leaves hooks on modules for good, when hidden states are first asked for. They do nothing in any other call.
RECORDS = "transformers.utils.output_capturing"


def _act(hooks: dict[int, Any]) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDS for hook in hooks.values())


class Watched:
    """All modules below some roots, as they are now.

    Attributes:
        hooked: "a Linear has hooks", if hooks or a method put in the place of `forward` watch over one of them: what
            does not call the modules, and a graph that is replayed, would not call these either. Else empty.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        # Dictionaries that belong to modules: looking into these is many times faster than asking the modules.
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._weights = [(m._parameters, name) for m in modules for name, w in m._parameters.items() if w is not None]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        hooked = (m for m in modules if _act({**m._forward_hooks, **m._forward_pre_hooks}) or "forward" in m.__dict__)
        self.hooked = next((f"a {type(module).__name__} has hooks" for module in hooked), "")
        self._addresses = self._where()

    def _where(self) -> list[int]:
        found = (weights.get(name) for weights, name in self._weights)
        return [0 if weight is None else weight.data_ptr() for weight in found]

    def unchanged(self) -> bool:
        """Whether modules, weights' addresses, and that there are hooks or none, are what they were.

        It takes some microseconds a layer.
        """
        same = all(children.get(name) is child for children, name, child in self._children)
        hooked = any(_act(hooks) for hooks in self._hooks if hooks) or any("forward" in own for own in self._own)
        return same and hooked == bool(self.hooked) and self._where() == self._addresses
