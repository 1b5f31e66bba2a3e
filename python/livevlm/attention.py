# SPDX-License-Identifier: Apache-2.0
"""How a forward pass reads the memory: which slots each layer attends to, at which positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from livevlm.config import Config
from livevlm.memory import Memory
from livevlm.retrieval import Retrieval
from livevlm.rope import Rope
from livevlm_kernels import score_tokens


@dataclass
class Turn:
    """What one question has chosen to look at; lives until its answer ends."""

    slots: dict[int, Tensor]  # layer -> retrieved video slots
    mass: dict[int, tuple[Tensor, Tensor]]  # layer -> (slots, attention of the answer's first token to them)
    want_mass: bool = False


class Read:
    """One forward pass. The tokens being read are the memory's provisional ones, `where`."""

    def __init__(
        self,
        memory: Memory,
        rope: Rope,
        config: Config,
        retrieval: Retrieval,
        where: slice,
        *,
        turn: Turn | None,
        observe: Callable[[int, Tensor], None] | None,
    ) -> None:
        self.memory, self.rope, self.config, self.retrieval = memory, rope, config, retrieval
        self.where = where
        self.turn, self.observe = turn, observe
        self.num_new = where.stop - where.start
        self.retrieves = turn is not None and (bool(turn.slots) or retrieval.is_needed(memory))
        self._shared_angles: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None

    def attend(self, module: nn.Module, query: Tensor, layer: int, scaling: float) -> Tensor:
        """query `[1, num_qo_heads, num_new, head_dim]`, un-rotated -> `[1, num_new, num_qo_heads, head_dim]`."""
        memory = self.memory
        q = query[0].transpose(0, 1)
        if self.observe is not None:
            self.observe(layer, q)
        slots = self._slots(layer, q)
        k, v = memory.k[layer], memory.v[layer]
        if slots is None:
            k, v = k[memory.base : memory.end], v[memory.base : memory.end]
        else:
            k, v = k.index_select(0, slots), v.index_select(0, slots)
        angles = self._angles(layer, slots, k)
        q = Rope.rotate(q, (angles[0][-self.num_new :], angles[1][-self.num_new :]))
        k = Rope.rotate(k, angles)
        # The first layer's last query is the same whatever is asked: its token is the chat template's.
        if self.turn is not None and self.turn.want_mass and layer > 0:
            self._record_mass(layer, slots, q[-1:], k, scaling)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return self._attention(module, q, k, v, scaling)

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

    def _slots(self, layer: int, q: Tensor) -> Tensor | None:
        """Slots attended to in time order, or None for all of them."""
        if not self.retrieves:
            return None
        assert self.turn is not None
        memory, retrieval = self.memory, self.retrieval
        if layer not in self.turn.slots:
            self.turn.slots[layer] = retrieval.select(memory, layer, q)
        tail = memory.video_start + retrieval.num_candidates(memory) * retrieval.block_size
        prompt = torch.arange(memory.base, memory.video_start, device=q.device)
        rest = torch.arange(tail, memory.end, device=q.device)
        return torch.cat((prompt, self.turn.slots[layer], rest))

    def _angles(self, layer: int, slots: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation of every key read; the last `num_new` rows are the queries' own."""
        if self.config.positions == "packed":  # the same numbers in every layer
            if self._shared_angles is None:
                self._shared_angles = self.rope.angles(torch.arange(k.shape[0], device=k.device), k)
            return self._shared_angles
        position = self.memory.position[layer]
        chosen = position[self.memory.base : self.memory.end] if slots is None else position.index_select(0, slots)
        return self.rope.angles(chosen, k)

    def _causal_mask(self, num_new: int, num_keys: int, device: torch.device) -> Tensor:
        """As transformers builds it, so that the same kernel computes the same bits; one for all layers."""
        if self._mask is None:
            row = torch.arange(num_keys - num_new, num_keys, device=device)
            self._mask = (torch.arange(num_keys, device=device) <= row[:, None])[None, None]
        return self._mask

    def _record_mass(self, layer: int, slots: Tensor | None, q: Tensor, k: Tensor, scaling: float) -> None:
        """Attention of the last query to every key, the largest over heads: where a head looked something up."""
        assert self.turn is not None
        mass = score_tokens(q, k, sm_scale=scaling, reduction="kv_head").amax(0)
        if slots is None:
            slots = torch.arange(self.memory.base, self.memory.end, device=k.device)
        self.turn.mass[layer] = (slots, mass)
