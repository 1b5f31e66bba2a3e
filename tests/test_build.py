# SPDX-License-Identifier: Apache-2.0
"""What the compiled library promises: its ops, the GPUs it is for, and that it loads under other torch versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import livevlm_kernels
from livevlm_kernels import _native, env

COMPILED = [
    "summarize_blocks",
    "score_tokens",
    "score_novelty",
    "score_redundancy",
    "select_tokens",
    "compact_tokens",
    "evict_similar",
    "merge_tokens",
]
needs_library = pytest.mark.skipif(not _native.LOADED, reason="built without compiled kernels")


def build_info() -> object:
    return pytest.importorskip("livevlm_kernels._build_info", exc_type=ImportError)


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_library
@pytest.mark.parametrize("op", COMPILED)
def test_ops_are_registered_for_the_devices_built_for(op):
    dump = torch._C._dispatch_dump(f"livevlm_kernels::{op}")
    assert re.search(r"^CPU:", dump, re.MULTILINE)
    assert livevlm_kernels.backends(op, "cpu")[0] == "cpu"
    if build_info().cuda_archs:
        assert re.search(r"^CUDA:", dump, re.MULTILINE)
        assert livevlm_kernels.backends(op, "cuda")[0] == "cuda"


@needs_library
def test_only_stable_symbols_are_taken_from_torch():
    symbols = run("nm", "-D", "--undefined-only", "--demangle", _native.PATH)
    unstable = [line for line in symbols.splitlines() if re.search(r"\b(c10|at|torch)::|\bPy[A-Z_]|\bcuda[A-Z]", line)]
    assert not unstable, unstable


@needs_library
def test_only_torch_and_system_libraries_are_needed():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", _native.PATH))
    allowed = re.compile(r"libtorch_cpu|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so|ld-linux")
    assert not [name for name in needed if not allowed.match(name)]


@needs_library
def test_machine_code_of_every_arch_is_in_the_library():
    archs = build_info().cuda_archs
    if not archs:
        pytest.skip("built without CUDA")
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump") or (bundled if bundled.is_file() else None)
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    found = set(re.findall(r"sm_(\d+)", run(cuobjdump, "-lelf", _native.PATH)))
    assert found == set(re.findall(r"(\d+)a?-real", archs))  # older cuobjdump prints sm_90a as sm_90


@needs_library
@pytest.mark.parametrize("build", ["", "baseline"])
def test_every_16_bit_float_is_widened_exactly(build):
    code = """
import torch
from livevlm_kernels import summarize_blocks
for dtype in (torch.float16, torch.bfloat16):
    k = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 2**13, 1, 8)
    wide = summarize_blocks(k, block_size=1, backend="cpu")
    torch.testing.assert_close(wide, k.float(), rtol=0, atol=0, equal_nan=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"LIVEVLM_CPU": build})


def test_environment_report():
    facts = env.collect()
    assert facts["torch"] == torch.__version__
    assert facts["compiled kernels"] == ("loaded" if _native.LOADED else _native.WHY_MISSING)
    assert "reference" in facts["op summarize_blocks"]
    printed = run(sys.executable, "-m", "livevlm_kernels.env")
    assert all(name in printed for name in facts)


def test_environment_report_without_a_library_or_packages(monkeypatch):
    monkeypatch.setattr(_native, "LOADED", False)
    monkeypatch.setattr(_native, "WHY_MISSING", "not built")
    monkeypatch.setattr(env, "_PACKAGES", ("torch", "no-such-package"))
    facts = env.collect()
    assert facts["compiled kernels"] == "not built"
    assert facts["no-such-package"] == "not installed"
