# SPDX-License-Identifier: Apache-2.0
"""`block_attention` over what `quantize_blocks` makes, against the same attention over what its codes stand for."""

from __future__ import annotations

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, block_attention, quantize_blocks
from livevlm_kernels.reference.quantize_blocks import dequantize

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("block_attention"))
each_format = pytest.mark.parametrize("form", ["fp8", "int4"])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# num_blocks, block_size, num_qo_heads, num_kv_heads, head_dim; queries and keys of each sequence
CASES = [
    pytest.param((40, 16, 28, 4, 128), [(1, 300)], id="7B_decode"),
    pytest.param((20, 64, 28, 4, 128), [(1, 300), (1, 64), (1, 65), (2, 129)], id="7B_decode_64"),
    pytest.param((12, 28, 14, 2, 64), [(1, 7), (2, 80), (1, 29)], id="0.5B_decode"),
    pytest.param((40, 16, 14, 2, 64), [(9 if kit.SLOW else 40, 150), (3, 3), (5, 77)], id="0.5B_questions"),
    pytest.param((30, 7, 6, 3, 18), [(2, 13), (3, 70)], id="odd"),
]
if not kit.SLOW:
    CASES.append(pytest.param((30, 49, 28, 4, 128), [(196, 600), (40, 240)], id="7B_clip"))


class Problem:
    """Quantised pools, and what their codes stand for."""

    def __init__(self, shape, lengths, form, device, dtype, per_head=False, empty=False):
        num_blocks, block_size, num_qo_heads, num_kv_heads, head_dim = shape
        self.queries, self.keys = zip(*lengths, strict=True)
        self.q = torch.randn(sum(self.queries), num_qo_heads, head_dim, device=device).to(dtype)
        k, v = (torch.randn(num_blocks, block_size, num_kv_heads, head_dim, device=device) for _ in range(2))
        k[..., 3::16] += 6.0
        self.positions = torch.randint(0, 900, (num_blocks, block_size), device=device, dtype=torch.int32)
        if empty:
            self.positions[torch.rand(num_blocks, block_size, device=device) < 0.3] = -1
        codes = quantize_blocks(k.to(dtype), v.to(dtype), dtype=form, positions=self.positions, backend="reference")
        self.k, self.v, self.k_scale, self.v_scale = codes
        self.exact = [
            dequantize(x.view(torch.uint8), scale, key)
            for x, scale, key in ((self.k, self.k_scale, True), (self.v, self.v_scale, False))
        ]
        counts = [-(-n // block_size) for n in self.keys]
        self.table = kit.block_tables(num_blocks, counts, num_kv_heads if per_head else None).to(device)
        self.seq_lens = torch.tensor(self.keys, dtype=torch.int32, device=device)
        self.cu_seqlens_q = torch.tensor([0, *self.queries]).cumsum(0).to(device, torch.int32)

    def run(self, backend, **options):
        options = {"cu_seqlens_q": self.cu_seqlens_q, "k_scale": self.k_scale, "v_scale": self.v_scale} | options
        pools = options.pop("k", self.k), options.pop("v", self.v)
        return block_attention(self.q, *pools, self.table, self.seq_lens, return_lse=True, backend=backend, **options)

    def expected(self, **options):
        options = {"cu_seqlens_q": self.cu_seqlens_q} | options
        return block_attention(
            self.q.float(), *self.exact, self.table, self.seq_lens, return_lse=True, backend="reference", **options
        )


def angles(num_positions, head_dim, device):
    frequency = 10_000 ** -(torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    angle = torch.arange(num_positions, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def close(results, expected, dtype, coarse=1.0):
    out, lse = results
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = TOLERANCE[dtype] * coarse
    torch.testing.assert_close(out.float(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected[1], rtol=tolerance, atol=tolerance)


@each_backend
@each_format
@pytest.mark.parametrize(("dtype", "per_head"), [(dtype, dtype == torch.bfloat16) for dtype in kit.DTYPES])
@pytest.mark.parametrize(("shape", "lengths"), CASES)
def test_matches_what_the_codes_stand_for(shape, lengths, dtype, per_head, form, backend, device):
    problem = Problem(shape, lengths, form, device, dtype, per_head)
    close(problem.run(backend), problem.expected(), dtype)


@each_backend
@each_format
@pytest.mark.parametrize(("packed", "table_dtype"), [(False, torch.float32), (True, torch.float16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if kit.INTERPRETED else kit.DTYPES)
@pytest.mark.parametrize(("shape", "lengths"), CASES[:3] if kit.SLOW else CASES)
def test_rotated(shape, lengths, dtype, packed, table_dtype, form, backend, device):
    problem = Problem(shape, lengths, form, device, dtype, empty=True)
    rope = {
        "cos_sin_cache": angles(900, shape[-1], device).to(table_dtype),
        "positions": problem.positions,
        "q_positions": torch.randint(0, 900, (len(problem.q),), device=device),
        "packed": packed,
    }
    # Logits are sums of 128 large numbers, rounded, and angles of 16 bits may be used with codes.
    coarse = 4.0 if dtype != torch.float32 else 20.0
    close(problem.run(backend, **rope), problem.expected(**rope), dtype, coarse)


@each_backend
@each_format
@pytest.mark.parametrize("window", [1, 20, 50])
def test_window(window, form, backend, device):
    problem = Problem((40, 16, 14, 2, 64), [(7, 301), (20, 20), (1, 77)], form, device, torch.bfloat16)
    close(problem.run(backend, window=window), problem.expected(window=window), torch.bfloat16)


@each_backend
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_seen_may_hold_anything(dtype, form, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(4, 100), (2, 30)], form, device, dtype, empty=True)
    expected = problem.run(backend, positions=problem.positions)
    used = torch.zeros(12, 16, dtype=torch.bool, device=device)
    for row, length in enumerate(problem.keys):
        slots = torch.arange(length, device=device)
        used[problem.table[row, slots // 16].long(), slots % 16] = True
    used &= problem.positions >= 0
    for pool in (problem.k, problem.v):
        pool.view(torch.uint8)[~used] = 255
    blocks = ~used.any(1)
    assert blocks.any()
    problem.k_scale[blocks] = torch.nan
    problem.v_scale[blocks] = torch.nan
    if form == "int4":
        problem.v_scale[~used] = torch.nan
    problem.table[problem.table < 0] = int(blocks.nonzero()[0])
    for a, b in zip(problem.run(backend, positions=problem.positions), expected, strict=True):
        assert torch.equal(a, b)


@each_backend
@each_format
def test_a_result_does_not_depend_on_the_batch(form, backend, device):
    if backend == "reference":
        pytest.skip("it multiplies matrices of another size")
    lengths = [(1, 300), (9 if kit.SLOW else 33, 301), (2, 40), (1, 1), (1, 512)]
    problem = Problem((120, 16, 14, 2, 64), lengths, form, device, torch.bfloat16)
    options = {"cos_sin_cache": angles(900, 64, device), "positions": problem.positions}
    out, lse = problem.run(backend, **options)
    start = 0
    for row, (num_queries, num_keys) in enumerate(lengths):
        mine = slice(start, start + num_queries)
        alone = block_attention(
            problem.q[mine], problem.k, problem.v, problem.table[row : row + 1, : -(-num_keys // 16)],
            problem.seq_lens[row : row + 1], k_scale=problem.k_scale, v_scale=problem.v_scale, return_lse=True,
            backend=backend, **options,
        )  # fmt: skip
        assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])
        start += num_queries


@each_backend
@each_format
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts(layout, form, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(5, 60), (9, 33)], form, device, torch.float16)
    change = kit.LAYOUTS[layout]
    k, v = (change(x.view(torch.uint8).half()).to(torch.uint8) for x in (problem.k, problem.v))
    k, v = (torch.empty_strided(x.shape, like.stride(), dtype=torch.uint8, device=device).copy_(x)
            for x, like in ((k, change(k.half())), (v, change(v.half()))))  # fmt: skip
    results = problem.run(backend, k=k.view(problem.k.dtype), v=v.view(problem.v.dtype))
    close(results, [x.float() for x in problem.run(backend)], torch.float16)


@each_backend
@each_format
def test_nan_shows(form, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(1, 60)], form, device, torch.bfloat16)
    problem.v_scale[problem.table[0, 1].long()] = torch.nan
    out, lse = problem.run(backend)
    assert out.isnan().any() and lse.isfinite().all()


FP8, BYTES = torch.zeros(5, 4, 2, 8).to(torch.float8_e4m3fn), torch.zeros(5, 4, 2, 4, dtype=torch.uint8)
Q, SCALE = torch.randn(6, 6, 8), torch.ones(5, 2)
PAIRS = {"k_scale": torch.ones(5, 2, 2, 8).half(), "v_scale": torch.ones(5, 4, 2, 2).half()}
INT4 = {"k": BYTES, "v": BYTES, **PAIRS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_scale": None}, r"k_scale must be a torch.Tensor, not NoneType"),
        ({"k_scale": None, "v_scale": None}, r"k has dtype float8_e4m3fn, which needs k_scale and v_scale"),
        ({"k": FP8.float(), "v": FP8.float()}, r"k has dtype float32; allowed: float8_e4m3fn, uint8"),
        ({"v": BYTES}, r"v has dtype uint8; allowed: float8_e4m3fn"),
        ({"q": Q.double()}, r"q has dtype float64; allowed: float32, float16, bfloat16"),
        ({"v_scale": SCALE[:4]}, r"v_scale must have shape \[num_blocks, num_kv_heads\] = \(5, 2\), not \(4, 2\)"),
        ({"v_scale": SCALE.half()}, r"v_scale has dtype float16; allowed: float32"),
        ({"k_scale": SCALE.to("meta")}, r"k_scale is on meta but k is on cpu"),
        ({"k_scale": torch.ones(2, 5).T}, r"k_scale must be contiguous; its strides are \(1, 5\)"),
        ({**INT4, "k_scale": SCALE.half()}, r"k_scale must have shape .* = \(5, 2, 2, 8\), not \(5, 2\)"),
        ({**INT4, "k_scale": torch.ones(5, 2, 2, 8)}, r"k_scale has dtype float32; allowed: float16"),
        ({**INT4, "q": Q[..., :4]}, r"q must have shape .* = \(6, 6, 8\), not \(6, 6, 4\)"),
    ],
)
def test_refuses(change, message):
    arguments = {"q": Q, "k": FP8, "v": FP8, "k_scale": SCALE, "v_scale": SCALE} | change
    table, lens = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ArgumentError, match=message):
        block_attention(**arguments, block_table=table, seq_lens=lens)
