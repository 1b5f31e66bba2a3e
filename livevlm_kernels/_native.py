# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled kernels (`_C.abi3.so`) if this install has them.

The library is optional: without it every op still has its PyTorch reference, and on a GPU its Triton kernel.
A library that is there but does not load is reported, never ignored.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    """Loads the library; returns why there is none, or None when it is loaded."""
    if not PATH.exists():
        return f"there are no compiled kernels in {PATH.parent} (a source folder? then: pip install -e .)"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        reason = f"{PATH.name} does not load under torch {torch.__version__}: {error}"
        warnings.warn(f"{reason}. Reinstall livevlm to rebuild it.", RuntimeWarning, stacklevel=2)
        return reason
    return None


WHY_MISSING: str | None = _load()
LOADED: bool = WHY_MISSING is None

# For tests: a library in which the CUDA kernels are CPU code (tests/emulation).
EMULATED: str | None = os.environ.get("LIVEVLM_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)


def implements(op: str, device_type: str) -> bool:
    """Whether the compiled library has a kernel of `op` for tensors on `device_type` ("cpu" or "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if not LOADED or key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"livevlm_kernels::{op}", key)
