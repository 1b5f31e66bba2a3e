# SPDX-License-Identifier: Apache-2.0
"""How a forward pass reads the memory: which slots each layer attends to, at which positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from livevlm.config import Config
from livevlm.evidence import FIRST_LAYER, Looks
from livevlm.memory import KVShape, Memory
from livevlm.retrieval import Retrieval
from livevlm.rope import Rope
from livevlm_kernels import backends, block_attention, score_tokens

FEW_QUERIES = 16
MOST_ANGLES = 2**18  # 64 MiB of them at head_dim 128


@dataclass
class Turn:
    """What one question has chosen to look at; lives until its answer ends."""

    want_mass: bool = False
    blocks: dict[int, Tensor] = field(default_factory=dict)  # layer -> retrieved blocks, counted from `video_start`
    mass: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a layer's slots, and the mass they got
    looks: Looks | None = None

    def found(self) -> Looks | None:
        """What the answer's first token attended to; None if nobody wanted to know."""
        if self.looks is None and self.mass:
            slots, mass = zip(*self.mass, strict=True)
            self.looks = Looks(torch.stack(slots), torch.stack(mass))
        return self.looks


def backend_for(config: Config, shape: KVShape, num_new: int, last_position: int) -> str | None:
    """Of `block_attention`, to read `num_new` tokens; None: gather keys and values for PyTorch's attention."""
    if config.attention != "auto":
        return None if config.attention == "sdpa" else config.attention
    if shape.device.type != "cuda" or shape.dtype == torch.float32:
        return None
    if config.positions != "packed" and last_position > MOST_ANGLES:
        return None  # a table of angles must not grow with the stream
    fastest = backends("block_attention", shape.device)[0]
    if fastest == "reference":
        return None
    # The CUDA kernels for many queries are for these head sizes; the other one reads keys again and again.
    many = shape.head_dim in (64, 128)
    return "auto" if fastest != "cuda" or many or num_new <= FEW_QUERIES else None


def angles_for(config: Config, memory: Memory, rope: Rope, last_position: int) -> Tensor:
    """The table of angles for reading in place. Packed, it stays the same one until the memory grows."""
    count = memory.num_slots if config.positions == "packed" else last_position
    return rope.table(count, memory.shape.dtype, memory.shape.device)


class Read:
    """One forward pass. The tokens being read are the memory's provisional ones, `where`."""

    def __init__(
        self,
        memory: Memory,
        rope: Rope,
        config: Config,
        retrieval: Retrieval,
        where: slice,
        first_position: int,
        *,
        turn: Turn | None,
        observe: Callable[[int, Tensor], None] | None,
        place: Tensor | None,
    ) -> None:
        self.memory, self.rope, self.config, self.retrieval = memory, rope, config, retrieval
        self.where = where
        self.first_position = first_position  # in the stream, of the first token being read
        self.turn, self.observe = turn, observe
        self.place = place  # of a clip, on the device: what a graph of it must not know from the host
        self.num_new = where.stop - where.start
        self.retrieves = turn is not None and (bool(turn.blocks) or retrieval.is_needed(memory))
        self.backend = backend_for(config, memory.shape, self.num_new, first_position + self.num_new)
        self._shared: dict[str, Tensor] = {}  # what is the same in every layer

    def attend(self, module: nn.Module, query: Tensor, layer: int, scaling: float) -> Tensor:
        """query `[1, num_qo_heads, num_new, head_dim]`, un-rotated -> `[1, num_new, num_qo_heads, head_dim]`."""
        q = query[0].transpose(0, 1)
        self.see(layer, q)
        table = self._block_table(layer, q)
        if self.backend is not None:
            out = self._attend_in_place(layer, q, table, scaling)
            if self._wants_mass(layer):
                q, k, _, slots = self._gathered(layer, q[-1:], table)
                self._record_mass(layer, slots, q, k, scaling)
            return out[None]
        q, k, v, slots = self._gathered(layer, q, table)
        if self._wants_mass(layer):
            self._record_mass(layer, slots, q[-1:], k, scaling)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return self._attention(module, q, k, v, scaling)

    def see(self, layer: int, q: Tensor) -> None:
        """Notes the un-rotated queries of a clip, `[num_new, num_qo_heads, head_dim]`."""
        if self.observe is not None:
            self.observe(layer, q)

    # ---------------------------------------------------------------- what is attended to
    @property
    def _num_slots(self) -> int:
        """Slots attended to, in the order of the block table; the empty ones before the prompt count."""
        memory, retrieval = self.memory, self.retrieval
        left_out = 0
        if self.retrieves:
            left_out = retrieval.num_candidates(memory) - retrieval.num_selected(memory)
        return memory.end - left_out * retrieval.block_size

    def _block_table(self, layer: int, q: Tensor) -> Tensor | None:
        """Blocks attended to in time order, int32, or None for all of them."""
        if not self.retrieves:
            return None
        assert self.turn is not None
        memory, retrieval = self.memory, self.retrieval
        if layer not in self.turn.blocks:
            self.turn.blocks[layer] = retrieval.select(memory, layer, q)
        first = memory.video_start // retrieval.block_size
        rest = self._all_blocks[first + retrieval.num_candidates(memory) :]
        return torch.cat((self._all_blocks[:first], self.turn.blocks[layer] + first, rest))

    @property
    def _all_blocks(self) -> Tensor:
        memory = self.memory
        return memory.block_numbers[: -(-memory.end // memory.block_size)]

    # ---------------------------------------------------------------- in place
    def _attend_in_place(self, layer: int, q: Tensor, table: Tensor | None, scaling: float) -> Tensor:
        memory = self.memory
        if "seq_lens" not in self._shared:
            self._shared["seq_lens"], self._shared["q_positions"] = self._lengths()
        if table is None:  # lengths on the device bound what is seen; a graph's table must do for all lengths
            table = self._all_blocks if self.place is None else memory.block_numbers
        out = block_attention(
            q,
            memory.blocks(memory.k, layer),
            memory.blocks(memory.v, layer),
            table[None],
            self._shared["seq_lens"],
            positions=memory.blocks(memory.position, layer),
            cos_sin_cache=angles_for(self.config, memory, self.rope, self.first_position + self.num_new),
            q_positions=self._shared["q_positions"],
            packed=self.config.positions == "packed",
            sm_scale=scaling,
            backend=self.backend or "auto",
        )
        assert isinstance(out, Tensor)
        return out

    def _lengths(self) -> tuple[Tensor, Tensor]:
        """Keys attended to, int32 `[1]`, and where the queries are rotated, int32 `[num_new]`."""
        device, count = self.memory.shape.device, self._num_slots
        rows = torch.arange(self.num_new, dtype=torch.int32, device=device)
        if self.place is not None:
            return self.place[1:2], rows + self.place[2:3]
        first = count - self.num_new if self.config.positions == "packed" else self.first_position
        return torch.full((1,), count, dtype=torch.int32, device=device), rows + first

    # ---------------------------------------------------------------- gathered
    def _gathered(self, layer: int, q: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (the last ones) and keys, rotated, values, and their slots: None for all in use."""
        memory, slots = self.memory, None
        k, v = memory.k[layer], memory.v[layer]
        if table is None:
            k, v = k[memory.base : memory.end], v[memory.base : memory.end]
        else:
            offset = torch.arange(memory.block_size, device=table.device)
            slots = (table.long()[:, None] * memory.block_size + offset).flatten()[memory.base : self._num_slots]
            k, v = k.index_select(0, slots), v.index_select(0, slots)
        angles = self._angles(layer, slots, k)
        q = Rope.rotate(q, (angles[0][-q.shape[0] :], angles[1][-q.shape[0] :]))
        return q, Rope.rotate(k, angles), v, slots

    def _attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Causal attention, the queries being the last tokens; `[1, heads, tokens, head_dim]`, rotated."""
        num_new, num_keys = q.shape[2], k.shape[2]
        mask = None  # one row sees everything; a square is SDPA's own causal flag
        if num_new not in (1, num_keys):
            if q.is_cuda:  # the flash kernel takes causality as a flag, and K and V unrepeated
                marker: Any = causal_lower_right(num_new, num_keys)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=marker, scale=scaling, enable_gqa=True)
                return out.transpose(1, 2)
            mask = self._causal_mask(num_new, num_keys, q.device)
        out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, dropout=0.0)
        return out

    def _angles(self, layer: int, slots: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation of every key read; the last rows are the queries' own."""
        if self.config.positions == "packed":  # the same numbers in every layer
            if "cos" not in self._shared:
                angles = self.rope.angles(torch.arange(k.shape[0], device=k.device), k)
                self._shared["cos"], self._shared["sin"] = angles
            return self._shared["cos"], self._shared["sin"]
        position = self.memory.position[layer]
        chosen = position[self.memory.base : self.memory.end] if slots is None else position.index_select(0, slots)
        return self.rope.angles(chosen, k)

    def _causal_mask(self, num_new: int, num_keys: int, device: torch.device) -> Tensor:
        """As transformers builds it, so that the same kernel computes the same bits; one for all layers."""
        if "mask" not in self._shared:
            row = torch.arange(num_keys - num_new, num_keys, device=device)
            self._shared["mask"] = (torch.arange(num_keys, device=device) <= row[:, None])[None, None]
        return self._shared["mask"]

    def _wants_mass(self, layer: int) -> bool:
        return self.turn is not None and self.turn.want_mass and layer >= FIRST_LAYER

    def _record_mass(self, layer: int, slots: Tensor | None, q: Tensor, k: Tensor, scaling: float) -> None:
        """Attention of the last query to every key, the largest over heads: where a head looked something up."""
        assert self.turn is not None
        mass = score_tokens(q, k, sm_scale=scaling, reduction="kv_head").amax(0)
        if slots is None:
            slots = torch.arange(self.memory.base, self.memory.end, device=k.device)
        self.turn.mass.append((slots, mass))
