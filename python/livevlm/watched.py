# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights are used without calling the modules, and whether they are still the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, compress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Leaves hooks on modules for good, when hidden states are first asked for. They do nothing in any other call.
RECORDS = "transformers.utils.output_capturing"


def _act(hooks: dict[int, Any]) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDS for hook in hooks.values())


def _values(dictionaries: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dictionaries))


class Watched:
    """All modules below some roots, as they are now.

    Attributes:
        hooked: "a Linear has hooks", if hooks or a method put in the place of `forward` watch over one of them: what
            does not call the modules, and a graph that is replayed, would not call these either. Else empty.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        # Dictionaries that belong to modules: looking into these is many times faster than asking the modules. Most are
        # not in the caches of a CPU that has waited for a GPU, so only what must be is looked at.
        self._children = [m._modules for m in modules if m._modules]
        self._weights = [m._parameters for m in modules if m._parameters]
        self._is_weight = [weight is not None for weight in _values(self._weights)]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        hooked = (m for m in modules if _act({**m._forward_hooks, **m._forward_pre_hooks}) or "forward" in m.__dict__)
        self.hooked = next((f"a {type(module).__name__} has hooks" for module in hooked), "")
        self._hooks_before = self._state_of_hooks()
        self._found, self._addresses = self._look()

    def _look(self) -> tuple[list[Any], list[int]]:
        """Modules, and addresses of weights. A call for every question and clip: no loop of Python's own."""
        weights = compress(_values(self._weights), self._is_weight)
        return list(_values(self._children)), list(map(Tensor.data_ptr, weights))

    def _state_of_hooks(self) -> tuple[int, list[int]]:
        """It differs where a hook was added anywhere, or an attribute to one of the modules."""
        return RemovableHandle.next_id, list(map(len, self._own))

    def _is_hooked(self) -> bool:
        state = self._state_of_hooks()
        if not self.hooked and state == self._hooks_before:
            return False
        self._hooks_before = state
        return any(map(_act, self._hooks)) or any("forward" in own for own in self._own)

    def unchanged(self) -> bool:
        """Whether modules, weights' addresses, and that there are hooks or none, are what they were.

        It takes a microsecond or two a layer.
        """
        if self._is_hooked() != bool(self.hooked):
            return False
        try:
            return self._look() == (self._found, self._addresses)
        except TypeError:  # a weight is not there any more
            return False
