# SPDX-License-Identifier: Apache-2.0
"""What the tests of every op need: the backends to run, and tensors in awkward memory layouts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import livevlm_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = bool(os.environ.get("LIVEVLM_EMULATED"))  # CUDA kernels, on the CPU: see tests/emulation
SLOW = INTERPRETED or EMULATED  # then leave out large shapes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cases(op: str) -> list[Any]:
    """All (backend, device) pairs of `op` as pytest parameters; under INTERPRETED or EMULATED only the slow one."""
    if SLOW:
        backend, mark = ("triton", pytest.mark.interpret) if INTERPRETED else ("emulated", pytest.mark.emulated)
        able = backend in livevlm_kernels.backends(op, "cpu")
        return [pytest.param(backend, "cpu", marks=mark, id=f"{backend}-cpu")] if able else []
    marks = {"cpu": [], "cuda": [pytest.mark.cuda]}
    return [
        pytest.param(backend, device, marks=marks[device], id=f"{backend}-{device}")
        for device in ("cpu", "cuda")
        for backend in livevlm_kernels.backends(op, device)
    ]


def overload(op: str, backend: str) -> Any:
    """The dispatcher overload behind a backend, for opcheck."""
    packet = getattr(torch.ops.livevlm_kernels, op)
    return getattr(packet, backend if backend in ("triton", "reference", "emulated") else "default")


def block_tables(num_blocks: int, counts: list[int], heads: int | None) -> Tensor:
    """A block table for sequences of `counts` blocks, all different ones in random order, and room for one more.

    Of each head, if `heads` is not None: `[len(counts), (heads,) max(counts) + 1]` int32.
    """
    table = torch.full((len(counts), heads or 1, max(counts) + 1), -1, dtype=torch.int32)
    for head in range(heads or 1):
        for row, blocks in enumerate(torch.randperm(num_blocks)[: sum(counts)].split(counts)):
            table[row, head, : counts[row]] = blocks
    return table if heads else table[:, 0]


def _surrounded(x: Tensor, padded: list[int], offset: int) -> Tensor:
    """A copy of `x` that is a view into a larger buffer, of shape `padded`, whose other elements are NaN."""
    buffer = torch.full((offset + torch.Size(padded).numel(),), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[offset:].view(padded)[tuple(slice(0, size) for size in x.shape)]
    return view.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy that starts one element past a 16-byte boundary: no vector load may touch it."""
    return _surrounded(x, list(x.shape), offset=1)


def padded(x: Tensor) -> Tensor:
    """A copy whose dimensions, but the first, all have gaps; rows of 16-byte multiples keep their alignment."""
    return _surrounded(x, [x.shape[0], *(size + 8 for size in x.shape[1:])], offset=0)


def swapped(x: Tensor, a: int, b: int) -> Tensor:
    """A copy with the dimensions `a` and `b` swapped in memory."""
    return x.transpose(a, b).contiguous().transpose(a, b)


# Layouts of keys and values [batch, tokens, heads, dim]: all the same values, so all must give the same result.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "heads_first": lambda x: swapped(x, 1, 2),  # transformers' [batch, heads, tokens, dim]
    "dim_strided": lambda x: swapped(x, 1, 3),
    "padded": padded,
    "misaligned": misaligned,
    "every_second_token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


def far_apart(x: Tensor, dim: int) -> Tensor:
    """A copy in which the last index of `dim` lies more than 2**31 elements behind the first.

    Uses x.element_size() * 2**31 bytes of address space; on the CPU only the pages that are written take memory.
    """
    strides = list(x.contiguous().stride())
    strides[dim] = (2**31 // (x.shape[dim] - 1) + 16) // 16 * 16
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return torch.empty(span, dtype=x.dtype, device=x.device).as_strided(x.shape, strides).copy_(x)
