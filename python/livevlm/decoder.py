# SPDX-License-Identifier: Apache-2.0
"""A forward pass of the language model over static buffers, so that it can be captured into a CUDA graph.

It uses the stock model's own modules for everything with weights, and rounds where they do; what lies between them is
fused (`livevlm_kernels/layer_steps.py`). But for the number of rows, nothing here depends on numbers that change from
question to question: those stand in `Buffers.facts`. So a pass can be replayed; run as it is, it computes the same.

Rows of padding behind a question are tokens like others, in slots that the answer will write over: no row before them
sees them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from livevlm.buffers import Buffers
from livevlm.config import Config
from livevlm.layers import Layers
from livevlm.memory import Memory
from livevlm.models import LlavaOnevisionAdapter
from livevlm.retrieval import Retrieval
from livevlm_kernels import block_attention, row_products
from livevlm_kernels.layer_steps import add_rms_norm, fill_table, silu_mul, store_tokens


class State(NamedTuple):
    """Rows on their way through the layers: what each layer has made of them is x + delta.

    Attributes:
        place: of the rows, as in `Buffers`; positions: int32 `[num_rows]`.
    """

    x: Tensor
    delta: Tensor | None
    place: Tensor
    positions: Tensor


class Decoder:
    """The passes of one memory.

    Args:
        layers: the decoder layers.
        angles: cosines and sines of all positions that passes may have.
        backend: of `block_attention`.
    """

    def __init__(
        self,
        adapter: LlavaOnevisionAdapter,
        layers: Layers,
        memory: Memory,
        retrieval: Retrieval,
        config: Config,
        buffers: Buffers,
        angles: Tensor,
        backend: str,
    ) -> None:
        self.adapter, self.layers = adapter, layers
        self.memory, self.retrieval, self.config = memory, retrieval, config
        self.buffers, self.angles, self.backend = buffers, angles, backend
        self.plain = all_plain(layers.all)  # few rows are multiplied by kernels of our own
        self.plain_head = row_products.is_plain(adapter.model.lm_head, bias=False)
        self.searched = retrieval.searched(memory) if config.retrieval != "none" else None

    @torch.no_grad()
    def begin_question(self, rows: int, *, retrieve: bool) -> State:
        """Reads the first `rows` of `ids` through the first layers; with `retrieve` their queries choose each layer's
        blocks."""
        buffers, memory = self.buffers, self.memory
        slots, positions = buffers.place[:1] + buffers.rows[:rows], buffers.place[2:3] + buffers.rows[:rows]
        memory.position.index_copy_(1, slots.long(), positions.expand(memory.shape.num_layers, -1))
        embeds = self.adapter.embed_rows(buffers.ids[:rows], buffers.after_video)
        state = State(embeds, None, buffers.place, positions)
        return self._through(range(len(self.layers.first)), state, retrieve, is_question=True)

    @torch.no_grad()
    def finish_question(self, state: State, *, retrieve: bool) -> None:
        """Reads on through the other layers."""
        others = range(len(self.layers.first), len(self.layers.all))
        x, delta, place, _ = self._through(others, state, retrieve, is_question=True)
        assert delta is not None
        last = place[3:4] - 1
        self._predict(x.index_select(0, last), delta.index_select(0, last))

    @torch.no_grad()
    def read_token(self) -> None:
        """Reads `token`, and moves on by one."""
        buffers = self.buffers
        embeds = self.adapter.embed_tokens(buffers.token)
        state = State(embeds, None, buffers.step, buffers.step[2:3])
        x, delta, *_ = self._through(range(len(self.layers.all)), state, False, is_question=False)
        assert delta is not None
        self._predict(x, delta)
        buffers.step[:3].add_(1)

    def _predict(self, x: Tensor, delta: Tensor) -> None:
        norm = self.adapter.language_model.norm
        _, x = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
        head, logits = self.adapter.model.lm_head, self.adapter.logits
        self.buffers.logits.copy_(row_products.product(x, head.weight) if self.plain_head else logits(x))

    def _through(self, indices: range, state: State, retrieve: bool, is_question: bool) -> State:
        x, delta, place, positions = state
        for index in indices:
            layer = self.layers.all[index]
            norm = layer.input_layernorm
            x, normed = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
            delta = self._attention(index, layer.self_attn, normed, place, positions, retrieve, is_question)
            norm = layer.post_attention_layernorm
            x, normed = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
            delta = self._mlp(layer.mlp, normed)
        return State(x, delta, place, positions)

    def _attention(
        self,
        index: int,
        module: Any,
        x: Tensor,
        place: Tensor,
        positions: Tensor,
        retrieve: bool,
        is_question: bool,
    ) -> Tensor:
        memory, buffers = self.memory, self.buffers
        last_q = buffers.last_q[index].flatten() if is_question else None
        if self.plain:
            wq, wk, wv = ((part.weight, part.bias) for part in (module.q_proj, module.k_proj, module.v_proj))
            q = row_products.project(x, wq, wk, wv, memory.k[index], memory.v[index], place, last_q)
        else:
            q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
            store_tokens(q, k, v, memory.k[index], memory.v[index], place, last_q)
        q = q.view(x.shape[0], -1, memory.shape.head_dim)
        if retrieve:
            assert self.searched is not None
            chooses = buffers.last_q[index][None] if self.retrieval.by_last else q
            selected = self.retrieval.search(chooses, self.searched[index], buffers.choice[3:4])
            fill_table(selected, buffers.choice, buffers.table[index])
        out = block_attention(
            q,
            memory.blocks(memory.k, index),
            memory.blocks(memory.v, index),
            buffers.table[index][None],
            place[1:2],
            positions=memory.blocks(memory.position, index),
            cos_sin_cache=self.angles,
            q_positions=positions,
            packed=self.config.positions == "packed",
            sm_scale=module.scaling,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return self._product(module.o_proj, out.flatten(1))

    def _mlp(self, mlp: Any, x: Tensor) -> Tensor:
        if self.plain:
            gated = row_products.gated(x, mlp.gate_proj.weight, mlp.up_proj.weight)
        else:
            gated = silu_mul(mlp.gate_proj(x), mlp.up_proj(x))
        return self._product(mlp.down_proj, gated)

    def _product(self, module: Any, x: Tensor) -> Tensor:
        return row_products.product(x, module.weight) if self.plain else module(x)


def all_plain(layers: list[Any]) -> bool:
    """Whether all weights of the layers are just that, so that kernels may read them past their modules."""
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        biased = (attention.q_proj, attention.k_proj, attention.v_proj)
        others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if not all(row_products.is_plain(part, bias=True) for part in biased):
            return False
        if not all(row_products.is_plain(part, bias=False) for part in others):
            return False
    return True
