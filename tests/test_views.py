# SPDX-License-Identifier: Apache-2.0
"""Every op on 41 views of keys and values, whose surroundings are NaN: no layout may change a result."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

import kit
from write_ops import CALLS, IN_PLACE, TOKENS, each_call, make


def view(
    x: Tensor, *, order: str = "bthd", pad: str = "", by: int = 0, every_second: str = "", offset: int = 0
) -> tuple[Tensor, Tensor]:
    """A copy of `x` [batch, tokens, (...,) heads, dim] inside a larger tensor of NaN, and that tensor.

    order: dimensions from the outermost in memory to the innermost. The dimensions `pad` are `by` elements longer in
    memory, of those in `every_second` every second element is used, and `offset` elements lie before the first.
    """
    dims = {"b": 0, "t": x.dim() - 3, "h": x.dim() - 2, "d": x.dim() - 1}
    outer = [*range(1, dims["t"])]  # frames: before the tokens
    axes = [axis for name in order for axis in ([*outer, dims[name]] if name == "t" else [dims[name]])]
    steps = {dims[name]: 2 for name in every_second}
    longer = {dims[name]: by for name in pad}
    room = [x.shape[axis] * steps.get(axis, 1) + longer.get(axis, 0) for axis in axes]
    buffer = torch.full((offset + prod(room),), torch.nan, dtype=x.dtype, device=x.device)
    inside = buffer[offset:].view(room).permute([axes.index(axis) for axis in range(x.dim())])
    cut = tuple(slice(0, size * steps.get(axis, 1), steps.get(axis, 1)) for axis, size in enumerate(x.shape))
    return inside[cut].copy_(x), buffer


VIEWS = [
    *({"offset": offset} for offset in range(17)),
    *({"pad": "d", "by": by} for by in range(1, 9)),
    *({"pad": "h", "by": by} for by in (1, 3)),
    *({"pad": "t", "by": by} for by in (1, 8)),
    {"order": "bhtd"},  # transformers' [batch, heads, slots, dim]
    {"order": "bhtd", "pad": "t", "by": 11},  # of which the first slots are in use
    {"order": "bhtd", "pad": "td", "by": 4, "offset": 1},
    {"order": "tbhd"},
    {"order": "hbtd", "pad": "b", "by": 1},
    {"order": "bdht"},
    {"order": "bthd", "every_second": "t"},
    {"order": "bthd", "every_second": "h"},
    {"order": "bthd", "every_second": "d"},
    {"order": "bhtd", "every_second": "thd"},
    {"pad": "bthd", "by": 8, "offset": 8},
    {"order": "dhtb", "pad": "bthd", "by": 3, "every_second": "b", "offset": 5},
]
SHAPE = (2, 21, 2, 64)


def expect(result: list[Tensor], expected: list[Tensor], exact: bool, layout: object) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text: f"{layout}: {text}")


def test_there_are_41_views():
    x = torch.randn(SHAPE)
    views = [view(x, **layout)[0] for layout in VIEWS]
    assert len({(v.stride(), v.storage_offset()) for v in views}) == 41 == len(VIEWS)
    assert all(torch.equal(v, x) for v in views)


@each_call
@pytest.mark.parametrize("dtype", [dtype for dtype in kit.DTYPES if dtype != torch.float16])
def test_views(name, dtype, backend, device):
    if name == "score_rotated" and dtype != torch.float32:
        pytest.skip("rotated keys may be rounded to 16 bits or not")
    call = CALLS[name]
    inputs = make(call, SHAPE, dtype, device)
    expected = call.run(backend, **{key: x.clone() for key, x in inputs.items()})
    views = VIEWS[1::9] if backend == "triton" else VIEWS  # which compiles for almost each of them
    keys = [key for key in inputs if key in TOKENS]
    for number in range(len(views)):
        layouts = {key: views[(number + 9 * i) % len(views)] for i, key in enumerate(keys)}  # not the same for two
        made = {key: view(inputs[key], **layouts[key]) for key in layouts}
        result = call.run(backend, **inputs | {key: x for key, (x, _) in made.items()})
        expect(result, expected, call.exact, layouts)
        for x, buffer in made.values():
            x.fill_(torch.nan)
            assert buffer.isnan().all(), f"{layouts}: something beside the view was written"


@each_call
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_expanded(name, dim, backend, device):
    call = CALLS[name]
    if call.op in IN_PLACE:
        pytest.skip("refuses it")
    inputs = make(call, SHAPE, torch.bfloat16 if name != "score_rotated" else torch.float32, device)
    views = {key: x.narrow(dim, 0, 1).expand(x.shape) for key, x in inputs.items() if key in TOKENS}
    expected = call.run(backend, **inputs | {key: x.contiguous() for key, x in views.items()})
    expect(call.run(backend, **inputs | views), expected, call.exact, f"dimension {dim}")
