# SPDX-License-Identifier: Apache-2.0
"""What this install can do and how it was built: the first thing to attach to a bug report.

Run it as `python -m livevlm_kernels.env` or `livevlm env`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys

import torch

import livevlm_kernels
from livevlm_kernels import _native, _registry

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "opencv-python-headless")
_FACTS = {
    "cuda_archs": "built for CUDA archs",
    "cuda_compiler": "built with CUDA",
    "cuda_flags": "CUDA flags",
    "cxx_compiler": "built with C++",
    "cxx_flags": "C++ flags",
    "build_type": "build type",
    "torch_version": "built against torch",
    "torch_abi_target": "stable ABI target",
}


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # names the build too, such as +cu130
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _build_facts() -> dict[str, str]:
    try:
        info = importlib.import_module("livevlm_kernels._build_info")
    except ImportError:  # optional, and tied to one Python version, unlike the kernels
        return {"build facts": "not recorded in this install"}
    return {label: str(getattr(info, name, "")) or "none" for name, label in _FACTS.items()}


def collect() -> dict[str, str]:
    """Facts about this install, in the order to print them. Never raises for something that is missing."""
    facts = {
        "livevlm": livevlm_kernels.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{package: _version(package) for package in _PACKAGES},
        "torch CUDA": torch.version.cuda or "none: a CPU build of torch",
        "GPU": _gpus(),
        "compiled kernels": _native.WHY_MISSING or "loaded",
    }
    if _native.LOADED:
        facts |= _build_facts()
    for op in _registry.ops():
        both = (f"{device}: {', '.join(livevlm_kernels.backends(op, device))}" for device in ("cpu", "cuda"))
        facts[f"op {op}"] = "; ".join(both)
    return facts


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
