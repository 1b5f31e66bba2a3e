# SPDX-License-Identifier: Apache-2.0
"""One layer of a LiveCache, as transformers sees it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from livevlm.cache import LiveCache


@dataclass(frozen=True)
class KVHandle:
    """What `update` gives to the attention function in the place of keys: a pointer, not a copy."""

    cache: LiveCache
    layer: int


class LiveLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: LiveCache, layer: int) -> None:
        super().__init__()
        self.handle = KVHandle(cast(Any, weakref.proxy(cache)), layer)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is allocated for all layers at once."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.handle.cache.write(self.handle.layer, key_states, value_states)
        return self.handle, self.handle

    def get_seq_length(self) -> int:
        """Tokens of the question so far. The memory is not counted: to `generate` every question is a fresh prompt."""
        return self.handle.cache.memory.num_new_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1
