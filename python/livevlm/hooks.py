# SPDX-License-Identifier: Apache-2.0
"""The narrow seam to transformers: what is changed on a model, when, and how it is undone.

`attach` registers two hooks on the language model and wraps `generate`. They act only on calls whose
`past_key_values` is a LiveCache; during such a call the attention function and the rotary embedding are exchanged and
put back afterwards, error or not. Every other use of the model runs the stock code, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface

from livevlm.errors import StateError
from livevlm.rope import IdentityRope

if TYPE_CHECKING:
    from livevlm.cache import KVHandle

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


class _Hooks:
    """Exchanges attention and rotary embedding around a forward pass over a LiveCache."""

    def __init__(self, language_model: Any, head_dim: int) -> None:
        self.rope: nn.Module = language_model.rotary_emb
        self.identity = IdentityRope(head_dim)
        self.stock_attention: str | None = None
        self.cache: Any = None  # the LiveCache being read

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from livevlm.cache import LiveCache

        cache = kwargs.get("past_key_values")
        if not isinstance(cache, LiveCache):
            return
        if self.cache is not None:
            raise StateError("the model is in the middle of a call with a LiveCache; one thread at a time can use it")
        cache.begin_forward(module, kwargs)
        self.cache = cache
        config = module.config
        self.stock_attention = config._attn_implementation
        config._attn_implementation = ATTENTION
        module._modules["rotary_emb"] = self.identity

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache
        if kwargs.get("past_key_values") is not cache or cache is None:
            return
        module.config._attn_implementation = self.stock_attention
        module._modules["rotary_emb"] = self.rope
        self.cache = None
        cache.end_forward(failed=output is None)


def attach(model: Any, language_model: Any, head_dim: int) -> nn.Module:
    """Lets `model` be called with a LiveCache; does nothing the second time. Returns the stock rotary embedding."""
    hooks: _Hooks | None = getattr(language_model, "_livevlm_hooks", None)
    if hooks is None:
        hooks = _Hooks(language_model, head_dim)
        object.__setattr__(language_model, "_livevlm_hooks", hooks)
        language_model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        language_model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
        stock_generate = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            from livevlm.cache import LiveCache

            cache = kwargs.get("past_key_values")
            if isinstance(cache, LiveCache):
                return cache.generate(stock_generate, *args, **kwargs)
            return stock_generate(*args, **kwargs)

        object.__setattr__(model, "generate", generate)
    return hooks.rope
