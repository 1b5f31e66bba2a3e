# SPDX-License-Identifier: Apache-2.0
"""Which token comes before which in its patch slot."""

from __future__ import annotations

import pytest
import torch

from livevlm.policies.history import previous_in_slot


def naive(row):
    last, before = {}, []
    for token, slot in enumerate(row):
        before.append(last.get(slot, -1) if slot >= 0 else -1)
        last[slot] = token
    return before


@pytest.mark.parametrize("shape", [(3, 200), (4, 1), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_previous_in_slot(shape, dtype):
    slots = torch.randint(-2, 9, shape, dtype=dtype)
    result = previous_in_slot(slots)
    assert result.dtype == torch.int32 and result.shape == shape
    assert result.tolist() == [naive(row) for row in slots.tolist()]


def test_frames_one_after_another():
    slots = torch.arange(4).repeat(3)[None]
    assert previous_in_slot(slots).tolist() == [[-1] * 4 + list(range(8))]
