# SPDX-License-Identifier: Apache-2.0
"""`quantize_blocks`: every backend gives the reference's bits, and those lose no more than half a step."""

from __future__ import annotations

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, quantize_blocks
from livevlm_kernels.reference.quantize_blocks import dequantize

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("quantize_blocks"))
each_format = pytest.mark.parametrize("dtype", ["fp8", "int4"])

# num_blocks, block_size, num_kv_heads, head_dim
FEW = 1 if kit.INTERPRETED else 4
SHAPES = [
    pytest.param((FEW + 1, 16, FEW, 128), id="7B"),
    pytest.param((FEW, 70, FEW // 2 + 1, 64), id="0.5B"),
    pytest.param((4, 7, 3, 18), id="odd"),
    pytest.param((2, 1, 1, 2), id="ones"),
    pytest.param((2, 3, 1, 300), id="wide"),
]


def content(shape, device, dtype=torch.bfloat16):
    """Keys and values; some channels of the keys are larger than all others, as in real ones."""
    k, v = (torch.randn(shape, device=device) for _ in range(2))
    k[..., 1::16] = k[..., 1::16] * 3 + 20
    return k.to(dtype), v.to(dtype)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(results, expected):
    for name, result, wanted in zip(results._fields, results, expected, strict=True):
        assert result.dtype == wanted.dtype and result.shape == wanted.shape and result.is_contiguous(), name
        number = wanted == wanted  # NaN has many bits
        assert torch.equal(number, result == result), name
        assert torch.equal(bits(result)[number], bits(wanted)[number]), name


def values_of(results, k):
    codes = (x.view(torch.uint8) for x in results[:2])
    scales = results[2:]
    return [dequantize(c, s, key) for c, s, key in zip(codes, scales, (True, False), strict=True)]


@each_backend
@each_format
@pytest.mark.parametrize("elements", kit.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_as_the_reference(shape, elements, dtype, backend, device):
    k, v = content(shape, device, elements)
    same(quantize_blocks(k, v, dtype=dtype, backend=backend), quantize_blocks(k, v, dtype=dtype, backend="reference"))


@each_backend
@pytest.mark.parametrize("elements", kit.DTYPES)
def test_int4_errs_by_half_a_step_at_most(elements, backend, device):
    k, v = content((2, 16, FEW, 64), device, elements)
    results = quantize_blocks(k, v, dtype="int4", backend=backend)
    k_pairs, v_pairs = results.k_scale[:, None].float(), results.v_scale[..., None, :].float()
    pairs = k_pairs.unbind(3), v_pairs.unbind(-1)
    for exact, got, (step, low) in zip((k, v), values_of(results, k), pairs, strict=True):
        rounding = low.abs() * 2**-11 if elements == torch.float32 else 0.0  # float16 holds the minimum of 16-bit ones
        assert ((got - exact.float()).abs() <= 0.501 * step + rounding + 1e-6).all()
        assert (got - exact.float()).abs().max() > 0.4 * step.min()


@each_backend
def test_fp8_errs_by_a_sixteenth_at_most(backend, device):
    k, v = content((2, 16, FEW, 64), device, torch.float32)
    results = quantize_blocks(k, v, dtype="fp8", backend=backend)
    for exact, got, scale in zip((k, v), values_of(results, k), results[2:], strict=True):
        assert ((got - exact).abs() <= exact.abs() / 16 + scale[:, None, :, None] * 2**-10).all()
        torch.testing.assert_close(got.abs().amax((1, 3)), exact.abs().amax((1, 3)))


@each_backend
def test_every_e4m3_number_and_what_lies_between_them(backend, device):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = [between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])]
    numbers = torch.cat([codes, *near])
    x = torch.cat((numbers, -numbers))[None, :, None, None].to(device).expand(-1, -1, 2, 2).contiguous()
    result = quantize_blocks(x, -x, dtype="fp8", backend=backend)
    assert (result.k_scale == 1).all()
    assert torch.equal(bits(result.k), bits(x.to(torch.float8_e4m3fn)))
    assert torch.equal(bits(result.v), bits((-x).to(torch.float8_e4m3fn)))


@each_backend
@each_format
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_empty_slots(lead, position_dtype, dtype, backend, device):
    k, v = content((*lead, 4, 8, 1, 16), device)
    positions = torch.randint(0, 50, (4, 8), device=device, dtype=position_dtype)
    positions[torch.rand(4, 8, device=device) < 0.4] = -1
    positions[2] = -7
    gone = positions < 0
    clean_k, clean_v = k.clone(), v.clone()
    k[..., gone, :, :], v[..., gone, :, :] = torch.nan, torch.inf
    result = quantize_blocks(k, v, dtype=dtype, positions=positions, backend=backend)
    same(result, quantize_blocks(clean_k, clean_v, dtype=dtype, positions=positions, backend="reference"))
    assert all(x.float().isfinite().all() for x in result)
    assert not any(bits(x)[..., gone, :, :].any() for x in (result.k, result.v))
    assert not result.k_scale.flatten(len(lead) + 1)[..., 2, :].any()  # of nothing
    if lead:
        own = positions.expand(*lead, -1, -1).clone()
        own[0] = 0
        part = quantize_blocks(clean_k, clean_v, dtype=dtype, positions=own, backend=backend)
        same(part, quantize_blocks(clean_k, clean_v, dtype=dtype, positions=own, backend="reference"))
        whole = quantize_blocks(clean_k[0], clean_v[0], dtype=dtype, backend=backend)
        same(type(part)(*(x[0] for x in part)), whole)  # nothing depends on other layers


@each_backend
@each_format
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_for_all_that_share_its_scale(what, dtype, backend, device):
    k, v = content((3, 8, 2, 16), device)
    k[1, 3, 0, 5] = v[1, 3, 0, 5] = what
    result = quantize_blocks(k, v, dtype=dtype, backend=backend)
    same(result, quantize_blocks(k, v, dtype=dtype, backend="reference"))
    assert all((x & 127 != 127).all() for x in map(bits, result[:2])) or dtype == "int4"
    expected = torch.zeros_like(k, dtype=torch.bool)
    expected[1, :, 0, 5 if dtype == "int4" else slice(None)] = True
    got = values_of(result, k)
    assert torch.equal(got[0].isfinite(), ~expected)
    expected[:] = False
    expected[1, 3 if dtype == "int4" else slice(None), 0] = True
    assert torch.equal(got[1].isfinite(), ~expected)


@each_backend
@each_format
def test_zeros_and_constants(dtype, backend, device):
    k, v = torch.zeros(2, 4, 2, 8, device=device), torch.full((2, 4, 2, 8), -3.5, device=device)
    k[1] = 1e-42  # the scale is 0, or almost
    result = quantize_blocks(k, v, dtype=dtype, backend=backend)
    same(result, quantize_blocks(k, v, dtype=dtype, backend="reference"))
    got = values_of(result, k)
    torch.testing.assert_close(got[0], k, rtol=0, atol=1e-40)
    torch.testing.assert_close(got[1], v)


@each_backend
@each_format
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts(layout, dtype, backend, device):
    k, v = content((5, 8, 2, 32), device)
    expected = quantize_blocks(k, v, dtype=dtype, backend="reference")
    change = kit.LAYOUTS[layout]
    same(quantize_blocks(change(k), change(v), dtype=dtype, backend=backend), expected)
    layers = [change(x)[None, 2:5] for x in (k, v)]
    same(quantize_blocks(*layers, dtype=dtype, backend=backend), [x[None, 2:5] for x in expected])


@each_backend
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strides_past_int32(dim, backend, device):
    k, v = content((2, 3, 2, 8), device)
    far = kit.far_apart(k, dim)
    same(quantize_blocks(far, v, dtype="int4", backend=backend), quantize_blocks(k, v, dtype="int4"))


K = torch.zeros(2, 4, 2, 8)
SPLIT = torch.zeros(2, 4, 2, 4, 2, 8)[:, :3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": K[0]}, r"k must have at least 4 dimensions"),
        ({"k": K.int()}, r"k has dtype int32; allowed"),
        ({"v": K[..., :4]}, r"v must have shape \[\*, num_blocks, block_size, num_kv_heads, head_dim\]"),
        ({"v": K.half()}, r"v has dtype float16; allowed: float32"),
        ({"dtype": "int8"}, r"dtype='int8' is unknown; allowed: fp8, int4"),
        ({"k": K[..., :7], "v": K[..., :7], "dtype": "int4"}, r"head_dim=7 must be even for dtype='int4'"),
        ({"positions": torch.zeros(2, 3).int()}, r"positions must have shape .* = \(2, 4\), not \(2, 3\)"),
        ({"positions": torch.zeros(2, 4)}, r"positions has dtype float32; allowed: int32, int64"),
        ({"k": K[:0], "v": K[:0]}, r"k is empty"),
        ({"k": SPLIT, "v": SPLIT}, r"k: its leading dimensions .* do not collapse"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ArgumentError, match=message):
        quantize_blocks(**{"k": K, "v": K, "dtype": "fp8", **change})
