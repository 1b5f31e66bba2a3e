# SPDX-License-Identifier: Apache-2.0
"""Definition of `merge_states`; arguments are checked and documented in `livevlm_kernels/merge_states.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs [P, Q, H, D], lses [P, Q, H] -> out [Q, H, D], lse [Q, H]."""
    top = lses.amax(0).clamp(min=torch.finfo(torch.float32).min)  # all parts empty: -inf - -inf is NaN
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    # The output of an empty part may hold anything, NaN included: select, do not multiply.
    parts = torch.where((lses == -torch.inf)[..., None], 0.0, outs.float()) * weights[..., None]
    out = parts.sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    return out.to(outs.dtype), torch.where(total == 0, -torch.inf, top + total.log())
