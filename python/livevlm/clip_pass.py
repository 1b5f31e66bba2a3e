# SPDX-License-Identifier: Apache-2.0
"""The language model over what is to be remembered: a clip, or the prompt. Only keys and values come of it.

The stock model's own modules do everything that has weights, and what lies between them is fused and rounds where
they do (`livevlm_kernels/layer_steps.py`), so keys and values are the same as those of the stock model. It ends with
the keys and values of the last layer: nothing reads what that layer would make of them.

Where a clip stands (its slots, how many keys it sees, its place in the stream) is read from the device: launches
depend on the number of its frames alone. Only where keys are gathered for PyTorch's attention, lengths are the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from livevlm_kernels.layer_steps import add_rms_norm, silu_mul, store_tokens

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

NUM_PLACES = 6  # numbers in a clip's facts, before the times of its frames


@dataclass(frozen=True)
class Clip:
    """A clip being read.

    Attributes:
        where: its slots, as far as the host knows: what is captured must not look.
        place: of the pass, int32 `[4]` on the device; see `livevlm_kernels/layer_steps.py`.
    """

    where: slice
    place: Tensor


def facts_of(cache: LiveCache, times: Tensor) -> Tensor:
    """All that differs between clips of a size, of the next one: float64, on the host; see `describe_tokens`."""
    start, position = cache.memory.end, cache.next_position
    count = times.shape[0] * cache.adapter.tokens_per_frame
    first = start if cache.config.positions == "packed" else position  # where its first query is rotated
    numbers = (start, start + count, first, count, position, cache.num_frames)
    return torch.cat((torch.tensor(numbers, dtype=torch.float64), times))


def see(cache: LiveCache, frames: Tensor, normalise: Callable[[Tensor], Tensor] | None) -> Tensor:
    """From pixels to embeddings `[num_tokens, hidden]`: the first half of the launches that `ClipReader` captures."""
    return cache.adapter.embed_frames(frames if normalise is None else normalise(frames))


def keep(cache: LiveCache, embeds: Tensor, facts: Tensor, where: slice) -> None:
    """From embeddings to keys and values in a clip's slots: the second half.

    Args:
        facts: `facts_of` the clip, on the device.
        where: its slots.
    """
    cache.memory.describe(facts, cache.adapter.tokens_per_frame)
    cache.clip = Clip(where, facts[:4].to(torch.int32))
    try:
        remember(cache, embeds)
    finally:
        cache.clip = None


def remember(cache: LiveCache, embeds: Tensor) -> None:
    """Reads embeddings `[num_tokens, hidden]` into the cache's memory: a clip's, or text behind what is there."""
    model = cache.adapter.language_model
    layers = cache.clips.layers()
    if layers is None:
        model(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    else:
        with cache.reading(model, {"inputs_embeds": embeds[None]}):
            # The fused kernels want rows; elsewhere the layout decides in which order a norm adds up.
            _layers(cache, layers.all, embeds.contiguous() if embeds.is_cuda else embeds)


def _layers(cache: LiveCache, layers: list[Any], x: Tensor) -> None:
    memory, read, num_tokens = cache.memory, cache.read, x.shape[0]
    assert read is not None
    place = read.place
    if place is None:
        place = torch.full((4,), read.where.start, dtype=torch.int32, device=x.device)
    heads = (1, num_tokens, memory.shape.num_qo_heads, memory.shape.head_dim)
    delta = None
    for index, layer in enumerate(layers):
        norm, attention, mlp = layer.input_layernorm, layer.self_attn, layer.mlp
        x, normed = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        store_tokens(q, k, v, memory.k[index], memory.v[index], place, None)
        q = q.view(heads)
        if index == len(layers) - 1:
            read.see(index, q[0])
            return
        out = read.attend(attention, q.transpose(1, 2), index, attention.scaling)
        delta = attention.o_proj(out.reshape(num_tokens, -1))
        norm = layer.post_attention_layernorm
        x, normed = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
        gate = mlp.gate_proj(normed)  # the largest tensor of all, so it is used again
        delta = mlp.down_proj(silu_mul(gate, mlp.up_proj(normed), out=gate))
