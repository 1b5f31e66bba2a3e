# SPDX-License-Identifier: Apache-2.0
"""The narrow seam to transformers: what is changed on a model, when, and how it is undone.

`attach` wraps two methods of a model: `generate`, and its language model's `forward`. The wrappers act only on calls
whose `past_key_values` is a LiveCache; during such a forward pass the attention function and the rotary embedding are
exchanged and put back afterwards, error or Ctrl-C or not. All other use of the model runs the stock code, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface

from livevlm.errors import StateError
from livevlm.rope import IdentityRope

if TYPE_CHECKING:
    from livevlm.live_layer import KVHandle

ATTENTION = "livevlm"  # no mask function has this name, so transformers builds no mask for it


def live_attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of a forward pass over a LiveCache; `key` is the handle that its `update` returned."""
    handle: KVHandle = key
    read = handle.cache.read
    if read is None:
        raise StateError("this LiveCache is not being read; call the model it was made for")
    return read.attend(module, query, handle.layer, scaling), None


AttentionInterface.register(ATTENTION, live_attention)


class LiveForward:
    """Stands before a language model's `forward`.

    A wrapper and not a pair of forward hooks: torch skips hooks after a KeyboardInterrupt, which would leave the model
    unusable. An object and not a closure: so a model can still be copied and pickled, and the copy refers to itself.
    """

    def __init__(self, module: Any, head_dim: int) -> None:
        self.module = module
        self.stock = module.forward
        self.rope: nn.Module = module.rotary_emb
        self.identity = IdentityRope(head_dim)
        self.busy = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from livevlm.cache import LiveCache

        cache = kwargs.get("past_key_values")
        if not isinstance(cache, LiveCache):
            return self.stock(*args, **kwargs)
        if self.busy:
            raise StateError("the model is in the middle of a call with a LiveCache; one thread at a time can use it")
        self.busy = True
        try:
            with cache.reading(self.module, kwargs):
                return self._exchanged(args, kwargs)
        finally:
            self.busy = False

    def _exchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, config = self.module, self.module.config
        attention = config._attn_implementation
        try:
            config._attn_implementation = ATTENTION
            module._modules["rotary_emb"] = self.identity
            return self.stock(*args, **kwargs)
        finally:
            config._attn_implementation = attention
            module._modules["rotary_emb"] = self.rope


class LiveGenerate:
    """Stands before a model's `generate`."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from livevlm.cache import LiveCache

        cache = kwargs.get("past_key_values")
        if isinstance(cache, LiveCache):
            return cache.generate(self.stock, *args, **kwargs)
        return self.stock(*args, **kwargs)


def attach(model: Any, language_model: Any, head_dim: int) -> nn.Module:
    """Lets `model` be called with a LiveCache; does nothing the second time. Returns the stock rotary embedding."""
    if not isinstance(language_model.__dict__.get("forward"), LiveForward):
        object.__setattr__(language_model, "forward", LiveForward(language_model, head_dim))
    if not isinstance(model.__dict__.get("generate"), LiveGenerate):
        object.__setattr__(model, "generate", LiveGenerate(model.generate))
    forward: LiveForward = language_model.__dict__["forward"]
    return forward.rope
