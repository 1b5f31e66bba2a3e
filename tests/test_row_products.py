# SPDX-License-Identifier: Apache-2.0
"""Matrix products of one row or few, with what surrounds them, against torch's in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kit
from livevlm_kernels import row_products
from test_layer_steps import cases

pytestmark = pytest.mark.parametrize(("backend", "device"), cases())
SHAPES = [(30, 224), (5, 4864)] if kit.SLOW else [(30, 224), (66, 4864), (7, 18944)]
each_shape = pytest.mark.parametrize(("height", "width"), SHAPES)
each_dtype = pytest.mark.parametrize("dtype", kit.DTYPES)


def module_of(backend: str) -> ModuleType:
    if backend == "eager":
        return row_products
    from livevlm_kernels.triton import row_products as kernels

    return kernels


def few_rows_of(backend: str) -> ModuleType:
    if backend == "eager":
        return row_products
    from livevlm_kernels.triton import few_row_products

    return few_row_products


def weights(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """`expected` in float64: rounded at the end, and once or twice in between."""
    error = (got.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[got.dtype]


@each_shape
@each_dtype
def test_product(height: int, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, weight = torch.randn(1, width).to(device, dtype), weights(dtype, device, height, width)
    out = module_of(backend).product(x, weight)
    assert out.shape == (1, height) and out.dtype == dtype
    assert_close(out, F.linear(x.double(), weight.double()))


def check_gated(kernels: ModuleType, x: Tensor, gate: Tensor, up: Tensor) -> None:
    out = kernels.gated(x, gate, up)
    assert out.shape == (x.shape[0], gate.shape[0]) and out.dtype == x.dtype
    assert_close(out, F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double()))


@each_shape
@each_dtype
def test_gated(height: int, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, gate, up = torch.randn(1, width).to(device, dtype), *(weights(dtype, device, height, width) for _ in range(2))
    check_gated(module_of(backend), x, gate, up)
    both = torch.cat((up, gate))  # in the other order, and not far apart
    check_gated(module_of(backend), x, both[height:], both[:height])


@each_dtype
@pytest.mark.parametrize(
    ("num_rows", "height", "width"),
    [(2, 30, 224), (33, 70, 300)] if kit.SLOW else [(2, 30, 224), (16, 32, 896), (33, 70, 300), (64, 18944, 3584)],
)
def test_gated_rows(num_rows: int, height: int, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(num_rows, width).to(device, dtype)
    check_gated(few_rows_of(backend), x, *(weights(dtype, device, height, width) for _ in range(2)))
    both = weights(dtype, device, 2 * height, width)
    check_gated(few_rows_of(backend), x, both[height:], both[:height])


@each_dtype
@pytest.mark.parametrize(("q_height", "kv_height", "width"), [(30, 6, 224), (66, 34, 896)])
def test_project(q_height: int, kv_height: int, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(1, width).to(device, dtype)
    heights = (q_height, kv_height, kv_height)
    parts = [(weights(dtype, device, h, width), weights(dtype, device, h)) for h in heights]
    slots = [torch.full((9, 2, kv_height // 2), 7.0, dtype=dtype, device=device) for _ in range(2)]
    place = torch.tensor([5, 6, 7, 1], dtype=torch.int32, device=device)
    last = () if backend == "triton" else (None,)
    q = module_of(backend).project(x, *parts, *slots, place, *last)
    for got, (weight, bias) in zip((q, slots[0][5].view(1, -1), slots[1][5].view(1, -1)), parts, strict=True):
        assert_close(got, F.linear(x.double(), weight.double(), bias.double()))
    for pool in slots:
        assert (pool[:5] == 7).all() and (pool[6:] == 7).all()


@each_dtype
@pytest.mark.parametrize("has_last", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "q_height", "kv_height", "width"),
    [(2, 30, 6, 224), (33, 66, 34, 300)] if kit.SLOW else [(2, 30, 6, 224), (32, 66, 34, 896), (64, 3584, 512, 3584)],
)
def test_project_rows(
    num_rows: int, q_height: int, kv_height: int, width: int, has_last: bool, dtype: torch.dtype, backend: str,
    device: str,
) -> None:  # fmt: skip
    x = torch.randn(num_rows, width).to(device, dtype)
    heights = (q_height, kv_height, kv_height)
    parts = [(weights(dtype, device, h, width), weights(dtype, device, h)) for h in heights]
    slots = [torch.full((num_rows + 9, 2, kv_height // 2), 7.0, dtype=dtype, device=device) for _ in range(2)]
    num_tokens = num_rows - 1
    place = torch.tensor([5, 6, 7, num_tokens], dtype=torch.int32, device=device)
    last_q = torch.zeros(q_height, dtype=dtype, device=device) if has_last else None
    q = few_rows_of(backend).project(x, *parts, *slots, place, last_q)
    keys, values = (pool[5 : 5 + num_rows].flatten(1) for pool in slots)
    expected = [F.linear(x.double(), weight.double(), bias.double()) for weight, bias in parts]
    assert_close(keys, expected[1])
    assert_close(values, expected[2])
    for pool in slots:
        assert (pool[:5] == 7).all() and (pool[5 + num_rows :] == 7).all()
    if last_q is not None:
        assert_close(last_q, expected[0][num_tokens - 1])
        assert (q[num_tokens:] == 0).all()
    count = num_tokens if has_last else num_rows
    assert_close(q[:count], expected[0][:count])
