# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for the GPUs we support, without having one: shows what a GPU would refuse."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kit  # noqa: E402

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")


def compile_kernel(kernel, arch: int, num_warps: int = 4, num_stages: int = 3, **arguments):
    """Compiles `kernel` for `arch`. For sm_90, which the tiles are chosen for, no register may spill.

    An argument is a type ("*bf16", "i32"; a "!" after it: divisible by 16), a constant, or a tuple of these; arguments
    in upper case are constants.
    """
    signature, constants, attrs = {}, {}, {}

    def describe(name, value, path):
        if isinstance(value, tuple):
            return tuple(describe(name, x, (*path, i)) for i, x in enumerate(value))
        if name.isupper() or not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value.endswith("!"):
            attrs[path] = [["tt.divisibility", 16]]
        return value.rstrip("!")

    for i, name in enumerate(kernel.arg_names):
        signature[name] = describe(name, arguments[name], (i,))
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    assert spills and (arch != 90 or not any(map(int, spills))), log.getvalue()
    return compiled


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("minmax", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_summarize_blocks(dtype, minmax, arch):
    from livevlm_kernels.triton.summarize_blocks import IN_FLIGHT, summarize_blocks_kernel

    compiled = compile_kernel(
        summarize_blocks_kernel,
        arch,
        num_warps=2,
        k=f"*{dtype}!",
        seq_lens="*i32!",
        first_token="*i32!",
        out="*fp32!",
        seq_len="i32",
        block_size="i32",
        num_blocks="i32",
        stride_batch="i64!",
        stride_token="i32!",
        stride_head="i32!",
        stride_dim=1,
        HEADS=4,
        DIM=128,
        TILE_HEADS=4,
        TILE_DIM=128,
        MINMAX=minmax,
        HAS_SEQ_LENS=True,
        HAS_FIRST_TOKEN=True,
        IN_FLIGHT=IN_FLIGHT,
    )
    assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes a thread
    assert compiled.asm["ptx"].count("ld.global.v4") >= IN_FLIGHT
