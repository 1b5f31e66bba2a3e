# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a decoder layer for one token or few, with what surrounds them; see `layer_steps.py`.

No public ops. Each function runs as one Triton kernel on a GPU; the eager code here is its definition.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from livevlm_kernels import layer_steps

MOST_ROWS = 64  # that there are kernels for


def _kernels(x: Tensor, *, alone: bool) -> Any:
    """The module of Triton kernels for a row that is alone, or for some, or None."""
    if not x.is_cuda or not layer_steps.HAS_TRITON or x.shape[0] > MOST_ROWS:
        return None
    from livevlm_kernels.triton import few_row_products, row_products

    return row_products if alone else few_row_products


def is_plain(module: nn.Module, *, bias: bool) -> bool:
    """Whether a module is nothing but a contiguous weight, and a bias or none."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    return "forward" not in module.__dict__ and module.weight.is_contiguous() and (module.bias is not None) == bias


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x `[1, width]` times weight `[height, width]` transposed -> `[1, height]`; more rows are left to torch."""
    if x.shape[0] == 1 and (kernels := _kernels(x, alone=True)):
        return kernels.product(x, weight)
    return F.linear(x, weight)


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate) * (x up): x `[rows, width]`, weights `[height, width]` -> `[rows, height]`."""
    if kernels := _kernels(x, alone=x.shape[0] == 1):
        return kernels.gated(x, gate, up)
    return layer_steps.silu_mul(F.linear(x, gate), F.linear(x, up))


def project(
    x: Tensor,
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    k_slots: Tensor,
    v_slots: Tensor,
    place: Tensor,
    last_q: Tensor | None,
) -> Tensor:
    """Queries of tokens x `[rows, width]`, `[rows, num_qo_heads * head_dim]`; keys and values go to their slots.

    Args:
        q, k, v: weight `[height, width]` and bias `[height]`.
        k_slots, v_slots, place, last_q: as in `layer_steps.store_tokens`.
    """
    alone = x.shape[0] == 1 and last_q is None
    if kernels := _kernels(x, alone=alone):
        return kernels.project(x, q, k, v, k_slots, v_slots, place, *([] if alone else [last_q]))
    queries = F.linear(x, *q)
    layer_steps.store_tokens(queries, F.linear(x, *k), F.linear(x, *v), k_slots, v_slots, place, last_q)
    return queries
