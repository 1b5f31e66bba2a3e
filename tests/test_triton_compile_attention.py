# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels that attend to blocks and choose them, as `test_triton_compile.py` does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import kit  # noqa: E402
from test_triton_compile import cache, compile_kernel  # noqa: E402, F401
from test_triton_compile_eviction import check, each_arch, strides  # noqa: E402

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# dtype, type of the cache, num_kv_heads, head_dim, block_size
MODELS = [
    pytest.param(("bf16", "fp32", 4, 128, 16), id="7B"),
    pytest.param(("fp16", "fp16", 2, 64, 196), id="0.5B"),
    pytest.param(("fp32", "fp32", 4, 128, 28), id="fp32"),
]
GROUP = 7
SIZES = ("batch", "total_q", "num_queries", "num_blocks", "max_blocks", "max_position", "window", "capacity")
STRIDES = {
    "q_strides": ("i32!", "i32!", 1),
    "k_strides": ("i64!", "i32!", "i32!", 1),
    "v_strides": ("i64!", "i32!", "i32!", 1),
    "table_strides": ("i32", "i32", 1),
    "cache_strides": ("i32!", 1),
}


def attention_arguments(model, tiles, constants, **options):
    dtype, cache_dtype, heads, dim, block_size = model
    share = 132 // heads
    return {
        **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}!"),
        **dict.fromkeys(("block_table", "seq_lens", "cu_seqlens_q", "positions", "q_positions"), "*i32!"),
        **dict.fromkeys(("lse", "part_out", "part_lse", "k_scale", "v_scale"), "*fp32!"),
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(("flat_length", "length"), "i32!"),
        **{"flat": "*i64!", "cos_sin_cache": f"*{cache_dtype}!", "scale_log2": "fp32", **STRIDES, **constants},
        **{"SMALL": tiles[0].rows, "MEDIUM": tiles[1].rows, "LARGE": tiles[2].rows, "SHARE": share, "HEADS": heads},
        **{"GROUP": GROUP, "DIM": dim, "BLOCK_SIZE": block_size, "RAGGED": True, "HAS_POSITIONS": True, "SAME": True},
        **{"ROPE": False, "PACKED": False, "CAUSAL": True, "WINDOW": False, "WIDEN": dtype == "fp32"},
        **{"PER_HEAD": False, "ALIGN": 16, "ROTATE_QUERIES": False, "FORMAT": 0, **options},
    }


@each_arch
@pytest.mark.parametrize("options", [{}, {"ROPE": True, "ROTATE_QUERIES": True}], ids=["plain", "rope"])
@pytest.mark.parametrize("size", [0, 1, 2], ids=["few", "some", "many"])
@pytest.mark.parametrize("model", MODELS)
def test_block_attention(model, size, options, arch):
    from livevlm_kernels.triton._attention_kernel import block_attention_kernel
    from livevlm_kernels.triton.block_attention import tiles_of

    constants, tiles = tiles_of(model[3], TYPES[model[0]])
    tile = tiles[size]
    if size and tile == tiles[size - 1]:
        pytest.skip("is the same kernel")
    arguments = attention_arguments(model, tiles, constants, **options, FLAT=size > 0)
    arguments |= {"TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys}
    compiled = check(compile_kernel(block_attention_kernel, arch, tile.num_warps, tile.num_stages, **arguments))
    if model[0] != "fp32":
        assert ("wgmma" if arch == 90 and size else "mma.sync") in compiled.asm["ptx"]  # tensor cores
        assert "cp.async.cg" in compiled.asm["ptx"]  # keys and values are on their way while others are used


@each_arch
@pytest.mark.parametrize(
    "options",
    [
        {"CAUSAL": False, "ROPE": True, "PACKED": True, "SAME": False, "PER_HEAD": True},
        {"WINDOW": True, "RAGGED": False, "HAS_POSITIONS": False},
    ],
    ids=["packed", "window"],
)
def test_options_of_block_attention(options, arch):
    from livevlm_kernels.triton._attention_kernel import block_attention_kernel
    from livevlm_kernels.triton.block_attention import tiles_of

    model = ("bf16", "fp32", 4, 128, 16)
    constants, tiles = tiles_of(128, torch.bfloat16)
    tile = tiles[2]
    arguments = attention_arguments(model, tiles, constants, **options, FLAT=True)
    arguments |= {"TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys}
    check(compile_kernel(block_attention_kernel, arch, tile.num_warps, tile.num_stages, **arguments))


@each_arch
@pytest.mark.parametrize("form", [1, 2], ids=["fp8", "int4"])
@pytest.mark.parametrize("size", [0, 2], ids=["few", "many"])
@pytest.mark.parametrize("model", MODELS[:2])
def test_quantised_pools(model, size, form, arch):
    from livevlm_kernels.triton._attention_kernel import block_attention_kernel
    from livevlm_kernels.triton.block_attention import tiles_of

    constants, tiles = tiles_of(model[3], TYPES[model[0]], True)
    tile, pairs = tiles[size], "*fp16!" if form == 2 else "*fp32!"
    arguments = attention_arguments(model, tiles, constants, ROPE=True, FLAT=False, FORMAT=form)
    arguments |= {"k": "*u8!", "v": "*u8!", "k_scale": pairs, "v_scale": pairs}
    arguments |= {"TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys}
    check(compile_kernel(block_attention_kernel, arch, tile.num_warps, tile.num_stages, **arguments))


@each_arch
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("int4", [False, True], ids=["fp8", "int4"])
def test_quantize_blocks(int4, dtype, arch):
    from livevlm_kernels.triton.quantize_blocks import quantize_blocks_kernel

    sides = dict.fromkeys(("k_strides", "v_strides"), ("i64!", "i64!", "i32!", "i32!", 1))
    arguments = {
        **{"k": f"*{dtype}!", "v": f"*{dtype}!", "positions": "*i32!", "k_codes": "*u8!", "v_codes": "*u8!"},
        **dict.fromkeys(("k_scale", "v_scale"), "*fp16!" if int4 else "*fp32!"),
        **{"num_blocks": "i32", "positions_stride": "i32", **sides, "HEADS": 4, "DIM": 128, "BLOCK_SIZE": 16},
        **{"INT4": int4, "HAS_POSITIONS": True, "TILE_TOKENS": 16, "TILE_DIM": 64},
    }
    check(compile_kernel(quantize_blocks_kernel, arch, **arguments))


@each_arch
@pytest.mark.parametrize("model", MODELS)
def test_small_kernels_of_block_attention(model, arch):
    from livevlm_kernels.triton._combine import combine_kernel, rows_at_once
    from livevlm_kernels.triton._slots import FLAT_TILE, flatten_kernel
    from livevlm_kernels.triton.block_attention import tiles_of

    constants, tiles = tiles_of(model[3], TYPES[model[0]])
    arguments = attention_arguments(model, tiles, constants, ROPE=True, SAME=False)
    check(compile_kernel(combine_kernel, arch, **arguments, ROWS=rows_at_once(False)))
    check(compile_kernel(flatten_kernel, arch, **arguments, TILE=FLAT_TILE), vector_loads=False)


@each_arch
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "dim"), [(28, 128), (14, 64)])
def test_merge_states(heads, dim, dtype, arch):
    from livevlm_kernels.triton.merge_states import merge_states_kernel, tile_of

    tile_rows, tile_dim = tile_of(dim)
    arguments = {
        **{"outs": f"*{dtype}!", "out": f"*{dtype}!", "lses": "*fp32!", "lse": "*fp32!"},
        **{"num_parts": "i32", "num_rows": "i32", **strides("outs", "part", "query", "head", "dim")},
        **strides("lses", "part", "query", "head"),
        **{"HEADS": heads, "DIM": dim, "TILE_ROWS": tile_rows, "TILE_DIM": tile_dim},
    }
    check(compile_kernel(merge_states_kernel, arch, **arguments))


@each_arch
@pytest.mark.parametrize("minmax", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(4, 128), (2, 64)])
def test_block_scores(heads, dim, minmax, arch):
    from livevlm_kernels.triton import _block_scores as module

    tile_blocks, tile_dim = module.block_tile(dim)
    arguments = {
        **{"q": "*bf16!", "means": "*fp32!", "keys": "*fp32!", "seq_lens": "*i32!", "scores": "*fp32!"},
        **dict.fromkeys(("num_queries", "num_blocks", "num_tiles"), "i32"),
        **strides("", "batch", "query", "block", "bound", "head", "dim"),
        **{"GROUP": GROUP, "DIM": dim, "MINMAX": minmax, "HAS_SEQ_LENS": True},
        **{"TILE_QUERIES": 16, "TILE_BLOCKS": tile_blocks, "TILE_DIM": tile_dim},
    }
    check(compile_kernel(module.mean_queries_kernel, arch, **arguments, HEADS=heads * GROUP))
    check(compile_kernel(module.block_scores_kernel, arch, **arguments, HEADS=heads))


@each_arch
@pytest.mark.parametrize("block_size", [1, 49])
def test_retrieve_blocks(block_size, arch):
    from livevlm_kernels.triton import retrieve_blocks as module

    sizes = ("entries", "num_blocks", "num_tiles", "num_selected", "num_always", "num_sink_blocks", "num_recent_blocks")
    tokens = triton.next_power_of_2(block_size)
    tile, num_warps = module.tile_of(1000)
    arguments = {
        **{"scores": "*fp32!", "seq_lens": "*i64!", "keys": "*i64!", "block_table": "*i32!", "counts": "*i32!"},
        **dict.fromkeys(sizes, "i32"),
        **{"block_size": "i32" if block_size > 1 else 1, "ratio_bits": "i64", "HEADS": 4},
        **{"PER_HEAD": False, "HAS_SEQ_LENS": True, "HAS_RATIO": True},
        **{"TILE_BLOCKS": 1024 // tokens, "TILE_TOKENS": tokens, "TILE": tile},
    }
    check(compile_kernel(module.rank_kernel, arch, **arguments), vector_loads=False)
    check(compile_kernel(module.table_kernel, arch, num_warps, **arguments), vector_loads=False)
