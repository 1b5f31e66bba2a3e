# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA on the CPU itself, by the kernels in emulation/emulation_test.cu."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

import kit

if not kit.EMULATED:
    pytest.skip("needs LIVEVLM_EMULATED", allow_module_level=True)
pytestmark = pytest.mark.emulated
UNWRITTEN = -1  # shared memory starts as ones


def run(name: str, values: torch.Tensor, count: int) -> torch.Tensor:
    """The int32 numbers that a kernel writes, which start as 0."""
    function = ctypes.CDLL(os.environ["LIVEVLM_EMULATED"]).livevlm_emulation_test
    function.restype = ctypes.c_char_p
    values, out = values.int(), torch.zeros(count, dtype=torch.int32)
    error = function(name.encode(), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    if error:
        raise RuntimeError(error.decode())
    return out


def test_barrier_and_shared_memory():
    values = torch.randint(1 << 30, (2, 64))
    assert torch.equal(run("reverse", values, 256).view(2, 64, 2), values.flip(1)[..., None].repeat(1, 1, 2).int())


def test_a_missing_barrier_shows():
    values = torch.arange(128).view(2, 64)
    result = run("no_barrier", values, 256).view(2, 64, 2)
    first, second = values.flip(1).int()  # the second block runs from its last thread on
    first[:32], second[32:] = UNWRITTEN, UNWRITTEN
    assert torch.equal(result[0], first[:, None].repeat(1, 2))
    assert torch.equal(result[1], second[:, None].repeat(1, 2))


def test_warp_functions():
    values = torch.randint(1, 100, (48,))
    results = run("warp_functions", values, 48 * 17).view(48, 17)
    for thread, row in enumerate(results.tolist()):
        first, end = (0, 32) if thread < 32 else (32, 48)
        warp, eight, lane = values[first:end].tolist(), thread // 8 * 8, thread - first
        v = values.tolist()

        def bits(select, warp=warp):
            return sum(1 << i for i, value in enumerate(warp) if select(value))

        assert row[:6] == [
            warp[3],
            v[eight + 3],
            v[max(thread - 2, eight + thread % 2) if thread % 8 >= 2 else thread],
            v[thread + 2 if thread % 8 < 6 else thread],
            warp[lane ^ 5],
            warp[lane ^ 1],
        ]
        assert torch.tensor(row[6], dtype=torch.int32).view(torch.float32) == warp[lane ^ 1]
        unsigned = [x & 0xFFFFFFFF for x in row]
        assert unsigned[7] == bits(lambda value: value % 3 == 0)
        assert row[8:10] == [v[35] in warp, True]
        assert unsigned[10] == bits(lambda value: value % 4 == v[thread] % 4)  # noqa: B023
        assert row[11:14] == [sum(warp), min(warp) - 40, max(warp)]
        assert row[14:] == [sum(value % 3 == 0 for value in v), True, False]


def test_parts_of_a_warp():
    values = torch.arange(32)
    live = values % 8 != 7
    low, high = (values[:16][live[:16]].sum() * 14**2), values[16:][live[16:]].sum()
    expected = torch.where(live, max(low, high), 0)
    assert torch.equal(run("diverge", values, 32), expected.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_product(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    words = torch.cat([a.flatten(), b.T.flatten()]).contiguous().view(torch.int32)
    result = run(f"matmul_{str(dtype).removeprefix('torch.')}", words, 128).view(torch.float32).view(16, 8)
    torch.testing.assert_close(result, a.float() @ b.float() + 1, rtol=1e-6, atol=1e-6)


def test_background_copies_arrive_when_waited_for():
    assert run("copy_async", torch.arange(1, 13), 4).tolist() == [1, 0, UNWRITTEN, 9]


def test_threads_can_wait_for_each_other():
    assert run("wait_for_flag", torch.tensor([7]), 3).tolist() == [7, 64, 63]
    with pytest.raises(RuntimeError, match=r"wait_for_flag: block \(0, 0, 0\): a thread waits forever"):
        run("wait_for_flag", torch.tensor([6]), 3)


def test_blocks_can_wait_for_each_other():
    assert run("wait_for_block", torch.zeros(1), 9).tolist() == [7] * 8 + [8 * 32]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deadlock", r"^deadlock: block \(0, 0, 0\): deadlock: 16 threads wait at __syncthreads and 16 at warp"),
        ("wrong_mask", "a mask that leaves it out"),
        ("too_many_threads", "thread block of this size"),
        ("too_much_shared", "too much shared memory"),
    ],
)
def test_errors_end_the_launch(name, message):
    with pytest.raises(RuntimeError, match=message):
        run(name, torch.zeros(2048), 4096)
    test_barrier_and_shared_memory()  # and the next one works
