# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights are used without calling the modules, and whether they are still the same ones."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from torch import Tensor, nn

# Leaves hooks on modules for good, when hidden states are first asked for. They do nothing in any other call.
RECORDS = "transformers.utils.output_capturing"


def _act(hooks: dict[int, Any]) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDS for hook in hooks.values())


def _places(entries: Iterable[tuple[dict[str, Any], str]]) -> tuple[tuple[Any, ...], ...]:
    """Dictionaries, and the names to look up in them."""
    return tuple(zip(*entries, strict=True)) or ((), ())


class Watched:
    """All modules below some roots, as they are now.

    Attributes:
        hooked: "a Linear has hooks", if hooks or a method put in the place of `forward` watch over one of them: what
            does not call the modules, and a graph that is replayed, would not call these either. Else empty.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        # Dictionaries that belong to modules: looking into these is many times faster than asking the modules.
        self._children = _places((m._modules, name) for m in modules for name in m._modules)
        self._weights = _places((m._parameters, n) for m in modules for n, w in m._parameters.items() if w is not None)
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        hooked = (m for m in modules if _act({**m._forward_hooks, **m._forward_pre_hooks}) or "forward" in m.__dict__)
        self.hooked = next((f"a {type(module).__name__} has hooks" for module in hooked), "")
        self._found = self._look()

    def _look(self) -> tuple[list[Any], list[int]]:
        """Modules, and addresses of weights; for every question and clip, so in no loop of Python's own.

        Raises:
            KeyError, TypeError: one is not there any more.
        """
        weights: Iterator[Any] = map(operator.getitem, *self._weights)
        return list(map(operator.getitem, *self._children)), list(map(Tensor.data_ptr, weights))

    def unchanged(self) -> bool:
        """Whether modules, weights' addresses, and that there are hooks or none, are what they were.

        It takes some microseconds a layer, most of them to bring what it looks at into the CPU's caches.
        """
        hooked = any(self._hooks) and any(map(_act, self._hooks))
        if bool(self.hooked) != (hooked or any(map(operator.contains, self._own, repeat("forward")))):
            return False
        try:
            return self._look() == self._found
        except (KeyError, TypeError):
            return False
