# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels that score, select and move tokens, as `test_triton_compile.py` does."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

import kit  # noqa: E402
from test_triton_compile import cache, compile_kernel  # noqa: E402, F401

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")

each_arch = pytest.mark.parametrize("arch", [80, 90])
each_dtype = pytest.mark.parametrize("dtype", ["bf16", "fp32"])
each_model = pytest.mark.parametrize(("heads", "dim"), [pytest.param(4, 128, id="7B"), pytest.param(2, 64, id="0.5B")])
MAX_SHARED = 160 << 10  # bytes; sm_80 has 163 KiB a block


def strides(name: str, *dims: str) -> dict[str, object]:
    """Types of the strides of a contiguous tensor; `name` is "" if the kernel has only one with strides."""
    prefix = f"{name}_" if name else ""
    return {f"{prefix}stride_{dim}": 1 if dim == dims[-1] else "i64!" for dim in dims}


def check(compiled, vector_loads: bool = True):
    assert compiled.metadata.shared <= MAX_SHARED
    if vector_loads:
        ptx = compiled.asm["ptx"]
        assert "ld.global.v4" in ptx or "ld.global.v2.b64" in ptx or "cp.async.cg" in ptx  # 16 bytes a thread
    return compiled


@each_arch
@each_dtype
@each_model
def test_recent_patches(heads, dim, dtype, arch):
    from livevlm_kernels.triton.score_redundancy import recent_patches_kernel, tile_of

    tile_slots, tile_dim, num_warps = tile_of(16, dim)
    compiled = compile_kernel(
        recent_patches_kernel,
        arch,
        num_warps,
        recent_k=f"*{dtype}!",
        patches="*fp32!",
        num_frames="i32",
        tokens_per_frame="i32",
        num_tiles="i32",
        **strides("", "batch", "frame", "slot", "head", "dim"),
        HEADS=heads,
        DIM=dim,
        TILE_SLOTS=tile_slots,
        TILE_DIM=tile_dim,
    )
    check(compiled)


@each_arch
@pytest.mark.parametrize("per_head", [False, True])
@each_dtype
@each_model
def test_score_redundancy(heads, dim, dtype, per_head, arch):
    from livevlm_kernels.triton.score_redundancy import score_redundancy_kernel, tile_of

    tile_tokens, tile_dim, num_warps = tile_of(18_000, dim)
    compiled = compile_kernel(
        score_redundancy_kernel,
        arch,
        num_warps,
        k=f"*{dtype}!",
        v=f"*{dtype}!",
        patches="*fp32!",
        slots="*i32!",
        seq_lens="*i32!",
        similarity="*fp32!",
        value_norm="*fp32!",
        seq_len="i32",
        tokens_per_frame="i32",
        num_tiles="i32",
        **strides("k", "batch", "token", "head", "dim"),
        **strides("v", "batch", "token", "head", "dim"),
        **strides("slots", "batch", "token"),
        HEADS=heads,
        DIM=dim,
        TILE_TOKENS=tile_tokens,
        TILE_DIM=tile_dim,
        PER_HEAD=per_head,
        HAS_SEQ_LENS=True,
    )
    check(compiled)


@each_arch
@each_dtype
@each_model
def test_score_novelty(heads, dim, dtype, arch):
    from livevlm_kernels.triton.score_novelty import score_novelty_kernel
    from livevlm_kernels.triton.score_redundancy import tile_of

    tile_tokens, tile_dim, num_warps = tile_of(13_568, dim)
    compiled = compile_kernel(
        score_novelty_kernel,
        arch,
        num_warps,
        **dict.fromkeys(("slots", "previous", "seq_lens"), "*i32!"),
        **{"x": f"*{dtype}!", "usual": "*fp32!", "change": "*fp32!", "step": "*fp32!"},
        **dict.fromkeys(("seq_len", "tokens_per_frame", "num_tiles"), "i32"),
        **strides("x", "batch", "token", "head", "dim"),
        **strides("usual", "batch", "token", "head", "dim"),
        **strides("slots", "batch", "token"),
        **strides("previous", "batch", "token"),
        HEADS=heads,
        DIM=dim,
        TILE_TOKENS=tile_tokens,
        TILE_DIM=tile_dim,
        HAS_SEQ_LENS=True,
    )
    check(compiled)


@each_arch
@pytest.mark.parametrize("integer", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("dims", [1, 2])
def test_compact_tokens(dims, integer, arch):
    from livevlm_kernels.triton.compact_tokens import compact_tokens_kernel

    columns = 1024 // int(integer[1:])  # slices of 128 bytes
    compiled = compile_kernel(
        compact_tokens_kernel,
        arch,
        num_warps=8,
        tensor=f"*{integer}!",
        indices="*i32!",
        seq_len="i32",
        num_rows="i32",
        num_columns="i32!",
        num_slices="i32",
        num_heads=1,
        stride_batch="i64!",
        stride_token="i64!",
        stride_head="i64!",
        **strides("indices", "batch", "head", "row"),
        sizes=("i32", "i32!")[-dims:],
        strides=("i64!", 1)[-dims:],
        DIMS=dims,
        TILE_ROWS=32768 // 128,
        TILE_COLUMNS=columns,
    )
    check(compiled)
    ptx = compiled.asm["ptx"]
    assert ptx.rindex("ld.global.v") < ptx.rindex("bar.sync") < ptx.index("st.global.v")  # read before any is written


@each_arch
@pytest.mark.parametrize("members", ["none", "one", "sorted"])
@pytest.mark.parametrize("explicit", [False, True])
def test_select_tokens(explicit, members, arch):
    from livevlm_kernels.triton._radix import tile_of
    from livevlm_kernels.triton.select_tokens import mark_members_kernel, order_kernel, phase_kernel

    tile, num_warps = tile_of(18_000)
    arguments = {
        **dict.fromkeys(("keys", "grouped", "order"), "*i64!"),
        **dict.fromkeys(("seq_lens", "buckets", "digits", "before"), "*i32!"),
        **dict.fromkeys(("seq_len", "num_buckets", "num_tiles", "num_chunks", "num_top", "capacity"), "i32"),
        **strides("", "batch", "token"),
        **strides("buckets", "batch", "token"),
        **{"scores": "*fp32!", "marks": "*i8!", "best": "*i8!" if members == "sorted" else "*i64!"},
        **{"HAS_SEQ_LENS": True, "EXPLICIT": explicit, "MEMBERS": members, "NONE_FIRST": False},
    }
    order = arguments | {"best": "*i64!", "TILE": 1024}
    check(compile_kernel(order_kernel, arch, **order), vector_loads=False)
    if members == "sorted":
        check(compile_kernel(mark_members_kernel, arch, **order), vector_loads=False)
    if members != "none":
        for long in (False, True):
            phase = arguments | {"LONG": long, "CHUNK": tile, "TILE": tile}
            check(compile_kernel(phase_kernel, arch, num_warps, **phase), vector_loads=False)


@each_arch
@pytest.mark.parametrize("long", [False, True])
def test_radix_selection(long, arch):
    from livevlm_kernels.triton._order import write_largest_kernel
    from livevlm_kernels.triton._radix import count_kernel, digit_kernel, tile_of

    tile, num_warps = tile_of(18_000)
    arguments = {
        **dict.fromkeys(("indices", "counts", "digits", "before"), "*i32!"),
        **dict.fromkeys(("seq_len", "budget", "n", "num_chunks"), "i32"),
        **{"keys": "*i64!", "TOP_SHIFT": 32, "NUMBER": 4, "LONG": long, "CHUNK": tile, "TILE": tile},
    }
    for kernel in (write_largest_kernel, digit_kernel, count_kernel) if long else (write_largest_kernel,):
        check(compile_kernel(kernel, arch, num_warps, **arguments), vector_loads=False)
