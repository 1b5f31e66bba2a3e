# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of `layer_steps` for the GPUs we support."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import kit
from test_triton_compile import cache, compile_kernel  # noqa: F401

pytestmark = pytest.mark.skipif(kit.INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_layer_steps(dtype: str, arch: int) -> None:
    from livevlm_kernels.triton import layer_steps as module

    names = ("x", "delta", "weight", "total", "out", "gate", "up", "q", "k", "v", "k_slots", "v_slots", "last_q")
    arguments = {
        **dict.fromkeys(names, f"*{dtype}!"),
        **dict.fromkeys(("place", "selected", "choice", "table"), "*i32"),
        **dict.fromkeys(("hidden", "numel", "q_width", "kv_width"), "i32!"),
        **{"most": "i32", "num_blocks": "i32", "eps": "fp32", "HAS_DELTA": True, "HAS_LAST": True},
        **dict.fromkeys(("position", "frame", "slot"), "*i32"),
        **{"facts": "*fp64", "time": "*fp64", "size": "*fp32"},
        **dict.fromkeys(("num_tokens", "tokens_per_frame", "num_slots"), "i32"),
    }
    for kernel, tile, num_warps in (
        (module.add_rms_norm_kernel, 4096, 16),
        (module.silu_mul_kernel, module.TILE, 4),
        (module.store_tokens_kernel, module.TILE, 4),
        (module.fill_table_kernel, module.TILE, 4),
        (module.describe_tokens_kernel, module.TILE, 4),
    ):
        compiled = compile_kernel(kernel, arch, num_warps, **arguments, TILE=tile)
        unaligned = kernel in (module.fill_table_kernel, module.describe_tokens_kernel)
        assert unaligned or "ld.global.v" in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [3584, 18944])
def test_row_products(width: int, arch: int) -> None:
    from livevlm_kernels.triton import row_products as module

    names = ("x", "weight", "out", "gate", "up", "q", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias")
    arguments = {
        **dict.fromkeys((*names, "k_slots", "v_slots"), "*bf16!"),
        **{"place": "*i32", **dict.fromkeys(("height", "q_height", "kv_height"), "i32!")},
        **dict.fromkeys(("num_q", "num_kv"), "i32"),
        "WIDTH": width,
    }
    rows, tile, num_warps = module.plan_of(width)
    for kernel in (module.product_kernel, module.gated_kernel, module.project_kernel):
        few = rows // 2 if kernel is module.gated_kernel else rows
        compiled = compile_kernel(kernel, arch, num_warps, **arguments, ROWS=few, TILE=tile)
        assert "ld.global.v4" in compiled.asm["ptx"]


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("arch", [80, 90])
def test_few_row_products(arch: int, rows: int) -> None:
    from livevlm_kernels.triton import few_row_products as module

    names = ("x", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "q", "k_slots", "v_slots", "last_q")
    arguments = {
        **dict.fromkeys((*names, "gate", "out"), "*bf16!"),
        **{"place": "*i32", "distance": "i64!", **dict.fromkeys(("height", "q_height", "kv_height"), "i32!")},
        **dict.fromkeys(("num_rows", "num_q", "num_kv"), "i32"),
        **{"WIDTH": 3584, "ROWS": rows, "HEIGHT": module.HEIGHT, "DEPTH": module.DEPTH},
        **{"HAS_LAST": True, "WIDEN": False},
    }
    for kernel, stages in (
        (module.project_rows_kernel, 4 if arch == 80 else module.PROJECT_STAGES),
        (module.gated_rows_kernel, module.GATED_STAGES),
    ):
        compiled = compile_kernel(kernel, arch, module.WARPS, **arguments, STAGES=stages)
        assert compiled.metadata.shared <= stages * (module.HEIGHT + rows) * module.DEPTH * 2, "as `_plan` counts it"
        assert "cp.async" in compiled.asm["ptx"] and ("wgmma" if arch == 90 else "mma.sync") in compiled.asm["ptx"]
