# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for the GPUs we support, without having one: shows what a GPU would refuse."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kit  # noqa: E402

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel, arch: int, num_warps: int = 4, **arguments):
    """Compiles `kernel`. An argument is a type ("*bf16", "i32"; a "!" after it: divisible by 16) or a constant."""
    names = kernel.arg_names
    types = {name: value for name, value in arguments.items() if isinstance(value, str)}
    source = ASTSource(
        kernel,
        signature={name: types[name].rstrip("!") if name in types else "constexpr" for name in names},
        constexprs={name: arguments[name] for name in names if name not in types},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").endswith("!")},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})


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
