# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of `score_tokens` and `evict_similar`, as `test_triton_compile.py` does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import kit  # noqa: E402
from test_triton_compile import cache, compile_kernel  # noqa: E402, F401
from test_triton_compile_eviction import check, each_arch, strides  # noqa: E402

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# num_queries, num_kv_heads, group, head_dim
MODELS = [pytest.param((64, 4, 7, 128), id="7B"), pytest.param((64, 2, 7, 64), id="0.5B")]


@each_arch
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_score_tokens(model, dtype, rope, arch):
    from livevlm_kernels.triton._row_sums import row_sums_kernel
    from livevlm_kernels.triton.score_tokens import KEYS_PER_SPLIT, key_sums_kernel, tiles_of

    num_queries, heads, group, dim = model
    constants, num_warps, *stages = tiles_of(num_queries * group, dim, rope, TYPES[dtype])
    arguments = {
        "q": f"*{dtype}!",
        "k": f"*{dtype}!",
        "seq_lens": "*i32!",
        "positions": "*i64!",
        "cos_sin_cache": "*fp32!",
        "scale_log2": "fp32",
        **strides("q", "batch", "query", "head", "dim"),
        **strides("k", "batch", "token", "head", "dim"),
        **strides("positions", "batch", "token"),
        **strides("cache", "row", "dim"),
        **dict.fromkeys(("tops", "sums", "top", "share", "scores"), "*fp32!"),
        **dict.fromkeys(("num_rows", "num_queries"), "i32!"),
        **dict.fromkeys(("seq_len", "max_position", "num_row_tiles", "num_key_tiles"), "i32"),
        **constants,
        **{"HEADS": heads, "GROUP": group, "DIM": dim, "ROPE": rope, "HAS_SEQ_LENS": True, "CAUSAL": True},
        "KEYS_PER_SPLIT": KEYS_PER_SPLIT,
    }
    for kernel, num_stages in zip((row_sums_kernel, key_sums_kernel), stages, strict=True):
        compiled = check(compile_kernel(kernel, arch, num_warps, num_stages, **arguments))
        assert dtype == "fp32" or ("wgmma" if arch == 90 else "mma.sync") in compiled.asm["ptx"]  # tensor cores


@each_arch
def test_small_kernels_of_score_tokens(arch):
    from livevlm_kernels.triton._row_sums import combine_kernel
    from livevlm_kernels.triton.score_tokens import mean_kernel

    arrays = dict.fromkeys(("tops", "sums", "top", "share", "scores", "means"), "*fp32!")
    sizes = dict.fromkeys(("num_rows", "num_splits", "seq_len", "num_tiles"), "i32")
    arguments = {**arrays, **sizes, "scale_log2": "fp32", "HEADS": 4, "NUM_SHARED": 28}
    check(compile_kernel(combine_kernel, arch, **arguments, TILE=128), vector_loads=False)
    check(compile_kernel(mean_kernel, arch, **arguments, TILE=512), vector_loads=False)


@each_arch
@pytest.mark.parametrize("num_shared", [1, 28])
def test_evict_similar(num_shared, arch):
    from livevlm_kernels.triton import evict_similar as module

    tile, num_warps = module.tile_of(18_000)
    arrays = dict.fromkeys(("similarity", "value_norm", "means", "shared_norm"), "*fp32!")
    sizes = dict.fromkeys(("seq_len", "past", "num_tiles", "num_dissimilar"), "i32")
    arguments = {**arrays, **sizes, "keys": "*i64!", "NUM_SHARED": num_shared, "SOME": True}
    for kernel in (module.mean_norm_kernel, module.norm_keys_kernel):
        check(compile_kernel(kernel, arch, num_warps, **arguments, TILE=tile), vector_loads=False)
    check(compile_kernel(module.similarity_keys_kernel, arch, **arguments, TILE=1024), vector_loads=False)
