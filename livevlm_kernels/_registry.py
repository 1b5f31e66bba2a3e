# SPDX-License-Identifier: Apache-2.0
"""Contracts of the ops in torch's dispatcher, and the choice of a backend.

Every op is one dispatcher name with up to three overloads of the same schema:

    livevlm_kernels::<op>             compiled C++ (CPU tensors) or CUDA (CUDA tensors), from _C.abi3.so
    livevlm_kernels::<op>.triton      the Triton kernel
    livevlm_kernels::<op>.reference   the eager PyTorch definition

(With LIVEVLM_EMULATED in the environment, for tests, there is also `.emulated`: CUDA kernels on CPU tensors.)

All have the same fake (shape) function, so `torch.compile(fullgraph=True)`, `torch.export` and meta tensors work
with each of them. Schemas are defined here, in Python, and need no compiled library.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from livevlm_kernels import _native
from livevlm_kernels.errors import BackendError

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

_LIBRARY = torch.library.Library("livevlm_kernels", "DEF")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# (op, backend) -> overload; filled once at import, so that looking a backend up is traceable by torch.compile.
_OVERLOADS: dict[tuple[str, str], Any] = {}


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
) -> None:
    """Registers an op.

    Args:
        name: stem of the op, e.g. "summarize_blocks".
        signature: dispatcher schema without the name, e.g. "(Tensor k, int block_size) -> Tensor".
        reference: eager PyTorch definition, called with the schema's arguments.
        fake: returns empty outputs of the right shape, dtype and device.
        triton: module that has a function `name` running the Triton kernel; imported at the first call.
    """
    overloads = {"reference": f"{name}.reference", "native": name}
    if triton is not None:
        overloads["triton"] = f"{name}.triton"
    if _native.EMULATED:
        overloads["emulated"] = f"{name}.emulated"
    for overload in overloads.values():
        _LIBRARY.define(f"{overload}{signature}", tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"livevlm_kernels::{overload}", fake, lib=_LIBRARY)

    _LIBRARY.impl(overloads["reference"], reference, "CompositeExplicitAutograd")
    packet = getattr(torch.ops.livevlm_kernels, name)
    _OVERLOADS[name, "reference"] = packet.reference
    if triton is not None:

        def run_triton(*args: Any) -> Any:
            return getattr(importlib.import_module(triton), name)(*args)

        _LIBRARY.impl(overloads["triton"], run_triton, "CUDA")
        if _HAS_TRITON:
            _OVERLOADS[name, "triton"] = packet.triton
        if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own interpreter runs kernels on CPU tensors
            _LIBRARY.impl(overloads["triton"], run_triton, "CPU")
    for device_type in ("cpu", "cuda"):
        if _native.implements(name, device_type):
            _OVERLOADS[name, device_type] = packet.default
    if _native.EMULATED and _native.implements(f"{name}.emulated", "cpu"):
        _OVERLOADS[name, "emulated"] = packet.emulated


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(sorted({op for op, _ in _OVERLOADS}))


def backends(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Backends that can run `op` on tensors of `device`, the one that "auto" takes first."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        order: tuple[str, ...] = ("cuda", "triton", "reference")
    elif device_type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        order = ("cpu", "reference", *(["triton"] if interpreted else []), "emulated")
    else:
        order = ("reference",)
    return tuple(backend for backend in order if (op, backend) in _OVERLOADS)


def overload(op: str, backend: str, device: torch.device) -> Any:
    """The dispatcher overload that `backend` means for `op` on `device`.

    Raises:
        BackendError: `backend` is unknown, not built, or not for this device. Only "auto" may choose.
    """
    able = backends(op, device)
    if backend == "auto":
        return _OVERLOADS[op, able[0]]
    if backend in able:
        return _OVERLOADS[op, backend]
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    why = ""
    if backend in ("cpu", "cuda") and backend == device.type:
        why = f" ({_native.WHY_MISSING or 'this op has no such kernel in this build'})"
    raise BackendError(
        f"backend={backend!r} cannot run {op} on {device.type} tensors{why}; available: auto, {', '.join(able)}"
    )
