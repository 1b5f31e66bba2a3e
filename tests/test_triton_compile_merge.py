# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of `merge_tokens`, as `test_triton_compile.py` does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import kit  # noqa: E402
from test_triton_compile import cache, compile_kernel  # noqa: E402, F401
from test_triton_compile_eviction import check, each_arch, each_dtype, each_model, strides  # noqa: E402

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")


@each_arch
@each_dtype
@each_model
def test_nearest_survivors(heads, dim, dtype, arch):
    from livevlm_kernels.triton._nearest import nearest_survivor_kernel, tiles_of

    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    tile_tokens, tile_rows, tile_dim, num_warps, widen = tiles_of(12_000, dim, torch_dtype)
    compiled = compile_kernel(
        nearest_survivor_kernel,
        arch,
        num_warps,
        k=f"*{dtype}!",
        indices="*i32!",
        seq_lens="*i32!",
        nearest="*i64!",
        seq_len="i32",
        num_rows="i32",
        rows_each="i32!",
        num_tiles="i32",
        **strides("", "batch", "token", "head", "dim"),
        **strides("indices", "batch", "row"),
        HEADS=heads,
        DIM=dim,
        HAS_SEQ_LENS=True,
        WIDEN=widen,
        TILE_TOKENS=tile_tokens,
        TILE_ROWS=tile_rows,
        TILE_DIM=tile_dim,
    )
    check(compiled)
    ptx = compiled.asm["ptx"]
    assert dtype == "fp32" or ("wgmma" if arch == 90 else "mma.sync") in ptx  # tensor cores


@each_arch
@pytest.mark.parametrize("has_groups", [False, True])
def test_groups(has_groups, arch):
    from livevlm_kernels.triton.merge_tokens import group_kernel

    compiled = compile_kernel(
        group_kernel,
        arch,
        groups="*i32!",
        nearest="*i64!",
        seq_lens="*i32!",
        targets="*i32!",
        seq_len="i32",
        num_groups="i32",
        num_tiles="i32",
        **strides("", "batch", "token"),
        HAS_GROUPS=has_groups,
        HAS_SEQ_LENS=True,
        TILE=1024,
    )
    check(compiled, vector_loads=False)


@each_arch
@each_dtype
@each_model
def test_merge_runs(heads, dim, dtype, arch):
    from livevlm_kernels.triton.merge_tokens import IN_FLIGHT, merge_runs_kernel

    compiled = compile_kernel(
        merge_runs_kernel,
        arch,
        num_warps=2 if dim == 128 else 1,
        k=f"*{dtype}!",
        v=f"*{dtype}!",
        order="*i64!",
        bounds="*i64!",
        sizes="*fp32!",
        weights="*fp32!",
        k_out=f"*{dtype}!",
        v_out=f"*{dtype}!",
        sizes_out="*fp32!",
        seq_len="i32",
        num_groups="i32",
        **strides("k", "batch", "token", "head", "dim"),
        **strides("v", "batch", "token", "head", "dim"),
        **strides("sizes", "batch", "token"),
        **strides("weights", "batch", "token"),
        HEADS=heads,
        DIM=dim,
        HAS_SIZES=True,
        HAS_WEIGHTS=True,
        TILE_HEADS=heads,
        TILE_DIM=dim,
        IN_FLIGHT=IN_FLIGHT,
    )
    check(compiled, vector_loads=dim == 128)
