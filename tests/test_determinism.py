# SPDX-License-Identifier: Apache-2.0
"""Same input, same bits: again, and whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

import kit
from write_ops import CALLS, each_call, make

SHAPES = {"cuda": (4, 3000, 4, 128), "cpu": (2, 40, 2, 16) if kit.INTERPRETED else (3, 700, 2, 64)}


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(name, dtype, backend, device):
    call = CALLS[name]
    inputs = make(call, SHAPES[device], dtype, device)

    def run(rows: slice) -> list[torch.Tensor]:
        return call.run(backend, **{key: x[rows].clone() for key, x in inputs.items()})

    first = run(slice(None))
    for _ in range(1 if kit.SLOW else 5):
        assert all(torch.equal(x, y) for x, y in zip(run(slice(None)), first, strict=True))
    if backend == "reference":
        return  # torch's own kernels choose by the shape of the batch
    for row in range(len(inputs["k"] if "k" in inputs else inputs["scores"])):
        for x, y in zip(run(slice(row, row + 1)), first, strict=True):
            assert torch.equal(x[0], y[row]), f"sequence {row} depends on the others"
