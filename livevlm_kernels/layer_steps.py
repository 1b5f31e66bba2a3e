# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer does between its matrix products, over buffers whose addresses never change.

No public ops: parts of a forward pass that is captured into a CUDA graph. What varies from replay to replay is read
from the device: `place` is int32 `[4]`, the first slot that the pass writes, the number of keys that it attends to, the
position of its first token, and how many of its rows are tokens (the rest are padding).

Each function runs as one Triton kernel on a GPU. The eager code here is its definition: it rounds where the modules of
transformers round, and works wherever Triton does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _kernels(like: Tensor) -> Any:
    """The module of Triton kernels, or None."""
    if not like.is_cuda or not HAS_TRITON:
        return None
    from livevlm_kernels.triton import layer_steps

    return layer_steps


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and that sum normalised; both `[rows, hidden]`, contiguous. None: nothing to add."""
    if kernels := _kernels(x):
        return kernels.add_rms_norm(x, delta, weight, eps)
    total = x if delta is None else x + delta
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * wide.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, `[rows, intermediate]`, contiguous; into `out`, which may be one of them."""
    if kernels := _kernels(gate):
        return kernels.silu_mul(gate, up, out)
    return torch.mul(F.silu(gate), up, out=out)


def store_tokens(
    q: Tensor, k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, place: Tensor, last_q: Tensor | None
) -> None:
    """Writes the keys and values of a pass into their slots.

    With `last_q`, keeps the query of the last token there and zeroes those of the padding: then they add nothing to
    what `retrieve_blocks` compares.

    Args:
        q: `[rows, num_qo_heads * head_dim]`, contiguous.
        k, v: `[rows, num_kv_heads * head_dim]`, contiguous.
        k_slots, v_slots: one layer, `[num_slots, num_kv_heads, head_dim]`, contiguous.
        last_q: `[num_qo_heads * head_dim]`, contiguous.
    """
    if kernels := _kernels(q):
        return kernels.store_tokens(q, k, v, k_slots, v_slots, place, last_q)
    row = torch.arange(q.shape[0], device=q.device)
    slots = row + place[0]
    k_slots.index_copy_(0, slots, k.view(-1, *k_slots.shape[1:]))
    v_slots.index_copy_(0, slots, v.view(-1, *v_slots.shape[1:]))
    if last_q is not None:
        num_tokens = place[3:4].long()
        last_q.copy_(q.index_select(0, num_tokens - 1)[0])
        q.masked_fill_((row >= num_tokens)[:, None], 0)


def describe_tokens(facts: Tensor, tokens_per_frame: int, known: Sequence[Tensor]) -> None:
    """Writes what is known of a clip's tokens into their slots, for all layers.

    Args:
        facts: float64 `[6 + num_frames]`: the four numbers of a `place`, then the first token's position in the stream
            and the index of its frame, then the time of each frame.
        known: position, frame, slot in the frame (int32), time (float64) and size (float32), each
            `[num_layers, num_slots]`, contiguous.
    """
    if kernels := _kernels(facts):
        return kernels.describe_tokens(facts, tokens_per_frame, known)
    token = torch.arange((facts.shape[0] - 6) * tokens_per_frame, device=facts.device)
    frame = token // tokens_per_frame
    parts = (token + facts[4], frame + facts[5], token % tokens_per_frame, facts[6:][frame], torch.ones_like(token))
    for tensor, part in zip(known, parts, strict=True):
        tensor.index_copy_(1, token + facts[0].long(), part.to(tensor.dtype).expand(tensor.shape[0], -1))


def fill_table(selected: Tensor, choice: Tensor, table: Tensor) -> None:
    """The block table of a layer: blocks before the video, the retrieved ones, the newest and what follows.

    Args:
        selected: retrieved blocks in time order, counted from the first of the video, int32 `[most]`; -1: none.
        choice: int32, `[3]` or more: first block of the video, how many blocks were candidates, how many are retrieved.
        table: int32 `[num_blocks]`, as many as the memory has; -1 behind the last one.
    """
    if kernels := _kernels(table):
        return kernels.fill_table(selected, choice, table)
    first, candidates, count = choice[:3].long().unbind()
    column = torch.arange(table.shape[0], device=table.device)
    found = selected[(column - first).clamp(0, selected.shape[0] - 1)]
    found = torch.where(found >= 0, found + first.int(), -1)
    later = column + candidates - count
    later = torch.where(later < table.shape[0], later, -1).int()
    table.copy_(torch.where(column < first, column.int(), torch.where(column < first + count, found, later)))
