# SPDX-License-Identifier: Apache-2.0
"""Every op on tensors whose strides lead more than 2^31 elements away."""

from __future__ import annotations

import pytest
import torch

import kit
from write_ops import CALLS, TOKENS, each_call, make


@each_call
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("head_dim", [64, 40])  # on tensor cores, and not
def test_strides_past_int32(head_dim, dim, name, backend, device):
    if backend == "triton" and head_dim != 64:
        pytest.skip("as good as the other one, but to be compiled")
    call = CALLS[name]
    inputs = make(call, (2, 12, 2, head_dim), torch.bfloat16, device)
    far = {key: x for key, x in inputs.items() if key in (*TOKENS, "scores") and dim < x.dim()}
    if not far:
        pytest.skip("has no such dimension")
    expected = call.run(backend, **{key: x.clone() for key, x in inputs.items()})
    result = call.run(backend, **inputs | {key: kit.far_apart(x, dim) for key, x in far.items()})
    tolerance = {"rtol": 0, "atol": 0} if call.exact else {}
    torch.testing.assert_close(result, expected, **tolerance)
