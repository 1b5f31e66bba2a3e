# SPDX-License-Identifier: Apache-2.0
"""The small steps between a layer's matrix products: what transformers' modules compute, fused or not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import kit
from livevlm_kernels import layer_steps


def cases() -> list[object]:
    if kit.INTERPRETED:
        return [pytest.param("triton", "cpu", marks=pytest.mark.interpret, id="triton-cpu")]
    return [
        pytest.param("eager", "cpu", id="eager-cpu"),
        pytest.param("triton", "cuda", marks=pytest.mark.cuda, id="triton-cuda"),
    ]


each_case = pytest.mark.parametrize(("backend", "device"), cases())
each_dtype = pytest.mark.parametrize("dtype", kit.DTYPES)


def steps(backend: str) -> ModuleType:
    if backend == "eager":
        return layer_steps
    from livevlm_kernels.triton import layer_steps as kernels

    return kernels


def rows(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def assert_same(got: Tensor, expected: Tensor, backend: str) -> None:
    """Bit for bit where the same code runs; else a sum may be added up in another order, and rounded the other way."""
    if backend == "eager":
        assert torch.equal(got, expected)
    else:
        step = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(
            got, expected, rtol=(4 if kit.INTERPRETED else 2) * step if step > 1e-4 else 1e-5, atol=1e-6
        )


@each_case
@each_dtype
@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 896), (3, 224), (2, 3584)])
def test_add_rms_norm(num_rows: int, hidden: int, dtype: torch.dtype, backend: str, device: str) -> None:
    norm = Qwen2RMSNorm(hidden, eps=1e-6).to(device, dtype)
    nn.init.uniform_(norm.weight)
    x, delta = (5 * rows(dtype, device, num_rows, hidden) for _ in range(2))
    total, out = steps(backend).add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)
    if kit.INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates
        assert_same(total, x + delta, backend)
    else:
        assert torch.equal(total, x + delta)
    assert_same(out, norm(x + delta), backend)
    total, out = steps(backend).add_rms_norm(x, None, norm.weight, norm.variance_epsilon)
    assert torch.equal(total, x)
    assert_same(out, norm(x), backend)


@each_case
@each_dtype
def test_silu_mul(dtype: torch.dtype, backend: str, device: str) -> None:
    gate, up = (4 * rows(dtype, device, 3, 1100) for _ in range(2))
    expected = nn.functional.silu(gate) * up
    assert_same(steps(backend).silu_mul(gate, up), expected, backend)
    assert_same(steps(backend).silu_mul(gate, up, out=gate), expected, backend)
    assert_same(gate, expected, backend)


@each_case
@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_store_tokens(num_tokens: int, dtype: torch.dtype, backend: str, device: str) -> None:
    q, k, v = (rows(dtype, device, 5, width) for width in (14 * 16, 2 * 16, 2 * 16))
    before = [rows(dtype, device, 20, 2, 16) for _ in range(2)]
    place = torch.tensor([7, 99, 99, num_tokens], dtype=torch.int32, device=device)
    for last_q in (None, torch.zeros(14 * 16, dtype=dtype, device=device)):
        queries, slots = q.clone(), [x.clone() for x in before]
        steps(backend).store_tokens(queries, k, v, *slots, place, last_q)
        for got, old, new in zip(slots, before, (k, v), strict=True):
            assert torch.equal(got[7:12].flatten(1), new)
            assert torch.equal(got[:7], old[:7]) and torch.equal(got[12:], old[12:])
        if last_q is None:
            assert torch.equal(queries, q)
        else:
            assert torch.equal(last_q, q[num_tokens - 1])
            assert torch.equal(queries[:num_tokens], q[:num_tokens]) and not queries[num_tokens:].any()


@each_case
def test_describe_tokens(backend: str, device: str) -> None:
    layers, slots, per_frame, times = 3, 40, 7, [2.5, 1e9 + 0.25]
    known = [torch.full((layers, slots), -9, dtype=torch.int32, device=device) for _ in range(3)]
    known += [torch.full((layers, slots), -9, dtype=dtype, device=device) for dtype in (torch.float64, torch.float32)]
    before = [tensor.clone() for tensor in known]
    facts = torch.tensor([11, 99, 99, 14, 2**24 + 1, 2**24 + 3, *times], dtype=torch.float64, device=device)
    steps(backend).describe_tokens(facts, per_frame, known)
    token = torch.arange(14, device=device)
    expected = (
        token + 2**24 + 1,
        token // 7 + 2**24 + 3,
        token % 7,
        torch.tensor(times, dtype=torch.float64, device=device)[token // 7],
        torch.ones_like(token),
    )
    for got, old, new in zip(known, before, expected, strict=True):
        assert torch.equal(got[:, 11:25], new.to(got.dtype).expand(layers, -1))
        assert torch.equal(got[:, :11], old[:, :11]) and torch.equal(got[:, 25:], old[:, 25:])


@each_case
@pytest.mark.parametrize(
    ("first", "candidates", "chosen"),
    [(0, 0, []), (1, 6, [0, 2, 5]), (2, 6, [0, 1, 2, 3, 4, 5]), (1, 1, []), (1, 6, [1, -1, -1])],
)
def test_fill_table(first: int, candidates: int, chosen: list[int], backend: str, device: str) -> None:
    """Blocks before the video, the chosen ones (NaN may have left some out), and all that were no candidates."""
    most, num_blocks = 7, 1500
    padded = [*chosen, *[-1] * (most - len(chosen))]
    selected = torch.tensor(padded, dtype=torch.int32, device=device)
    choice = torch.tensor([first, candidates, len(chosen)], dtype=torch.int32, device=device)
    table = torch.full((num_blocks,), 77, dtype=torch.int32, device=device)
    steps(backend).fill_table(selected, choice, table)
    expected = [*range(first), *(x + first if x >= 0 else -1 for x in chosen), *range(first + candidates, num_blocks)]
    assert table.tolist() == [*expected, *[-1] * (num_blocks - len(expected))]
