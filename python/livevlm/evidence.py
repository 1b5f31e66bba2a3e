# SPDX-License-Identifier: Apache-2.0
"""What an answer rests on: how much its first token attended to what, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from livevlm.buffers import Buffers
from livevlm.memory import Memory
from livevlm.rope import Rope
from livevlm_kernels import score_tokens

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

FIRST_LAYER = 1  # the first layer's last query is the same whatever is asked: its token is the chat template's
LAYERS_AT_ONCE = 8  # keys of so many are gathered together


@dataclass(frozen=True)
class Evidence:
    """A frame that the answer looked at.

    Attributes:
        time: seconds since the start of the stream.
        frame: index of the frame in the stream.
        weight: largest attention of a head, over all layers but the first, that one of the frame's tokens got; 0..1.
    """

    time: float
    frame: int
    weight: float


@dataclass(frozen=True)
class Looks:
    """Attention of one token in each layer from `FIRST_LAYER` on, the largest over heads.

    Attributes:
        slots: where the keys lie, `[num_layers - FIRST_LAYER, num_keys]` int64.
        mass: `[num_layers - FIRST_LAYER, num_keys]` float32.
    """

    slots: Tensor
    mass: Tensor


@torch.no_grad()
def last_look(cache: LiveCache, buffers: Buffers, end: int) -> Looks:
    """From the queries that a captured pass has left in `last_q`; `end` is the slot behind the question."""
    memory, retrieval, block_size = cache.memory, cache.retrieval, cache.memory.block_size
    if retrieval.is_needed(memory):
        end -= (retrieval.num_candidates(memory) - retrieval.num_selected(memory)) * block_size
    offset = torch.arange(block_size, device=buffers.table.device)
    blocks = buffers.table[:, : -(-end // block_size), None].long().clamp_(min=0)
    slots = (blocks * block_size + offset).flatten(1)[:, memory.base : end]
    layers = range(FIRST_LAYER, memory.shape.num_layers)
    parts = [layers[at : at + LAYERS_AT_ONCE] for at in range(0, len(layers), LAYERS_AT_ONCE)]
    mass = [_mass(cache, buffers.last_q, slots, part) for part in parts]
    return Looks(slots[FIRST_LAYER:], torch.cat(mass))


def _mass(cache: LiveCache, last_q: Tensor, slots: Tensor, layers: range) -> Tensor:
    """`[len(layers), num_keys]`."""
    memory, rope, part = cache.memory, cache.rope, slice(layers.start, layers.stop)
    slots = slots[part]
    layer = torch.arange(layers.start, layers.stop, device=slots.device)[:, None]
    if cache.config.positions == "packed":
        positions = torch.arange(slots.shape[1], device=slots.device)[None]
    else:
        positions = memory.position[layer, slots]
    q = last_q[part, None]
    q = Rope.rotate(q, rope.angles(positions[:, -1:], q))
    table = rope.cos_sin_cache(positions)
    row = torch.arange(table[..., 0].numel(), dtype=torch.int32, device=slots.device)
    return score_tokens(
        q,
        memory.k[layer, slots],
        positions=row.view(positions.shape).expand(slots.shape),
        cos_sin_cache=table.flatten(0, 1),
        reduction="kv_head",
    ).amax(1)


def evidence_of(looks: Looks, memory: Memory, count: int) -> tuple[Evidence, ...]:
    """The `count` frames with the strongest look-up, from the attention of the answer's first token.

    A look-up is one head of one layer giving much of its attention to one token; averages over heads and layers
    hide it.
    """
    is_video = (looks.slots >= memory.video_start) & (looks.slots < memory.video_end)
    mass = torch.where(is_video, looks.mass, -1.0)
    top = mass.topk(min(mass.shape[1], 16 * count))
    slots = looks.slots.gather(1, top.indices)
    layer = torch.arange(FIRST_LAYER, FIRST_LAYER + slots.shape[0], device=slots.device)[:, None]
    facts = torch.stack((memory.frame[layer, slots].double(), memory.time[layer, slots], top.values.double()))
    best: dict[int, Evidence] = {}
    for frame, time, weight in facts.flatten(1).T.tolist():
        if weight >= 0 and (frame not in best or best[int(frame)].weight < weight):
            best[int(frame)] = Evidence(time, int(frame), weight)
    return tuple(sorted(best.values(), key=lambda e: (-e.weight, e.time))[:count])
