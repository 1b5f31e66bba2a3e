# SPDX-License-Identifier: Apache-2.0
"""Drives CMake and Ninja for the compiled kernels; what to build is in CMakeLists.txt, metadata in pyproject.toml.

torch must be installed first: the kernels are built against its headers, whatever its version from 2.11 on.
Environment:

    LIVEVLM_CUDA        AUTO (default: CUDA kernels if nvcc is found), ON (fail without nvcc), OFF (CPU kernels only)
    LIVEVLM_CUDA_ARCHS  GPU architectures, default "80-real;90a-real;90-virtual" (every 8.x GPU; H100 and H200; PTX
                        for newer ones)
    LIVEVLM_BUILD_INFO  AUTO (default: build facts for `livevlm env` if pybind11 is found) or OFF (the wheel then
                        serves every Python version)
    CUDACXX             nvcc to use, if not the one on PATH
    MAX_JOBS            compilers to run at once, default one per core
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("livevlm: this setuptools is too old to build with. Run: pip install 'setuptools>=77'")

ROOT = Path(__file__).resolve().parent
CUDA = os.environ.get("LIVEVLM_CUDA", "AUTO").upper()
ARCHS = os.environ.get("LIVEVLM_CUDA_ARCHS", "80-real;90a-real;90-virtual")


@cache
def torch_dir() -> Path:
    """The torch package of the environment that is installed into.

    pip's build isolation hides it from this process by way of PYTHONPATH, but not from a child without that.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (os.environ, clean):
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip():
            return Path(found.stdout.strip())
    sys.exit("livevlm: no torch in this environment. Install torch >= 2.11 first, then livevlm.")


def torch_version() -> str:
    match = re.search(r"__version__ = '([^']*)'", (torch_dir() / "version.py").read_text())
    return match[1] if match else "unknown"


@cache
def pybind11_includes() -> list[str]:
    """Include folders for the optional _build_info module; empty if it cannot or must not be built."""
    python = Path(sysconfig.get_paths()["include"])
    if os.environ.get("LIVEVLM_BUILD_INFO", "AUTO").upper() == "OFF" or not (python / "Python.h").exists():
        return []
    spec = importlib.util.find_spec("pybind11")
    own = Path(spec.origin).parent / "include" if spec and spec.origin else torch_dir() / "include"
    return [str(python), str(own)] if (own / "pybind11" / "pybind11.h").exists() else []


def tool(name: str) -> str:
    """A program on PATH, or beside this interpreter (a venv that is used without being activated)."""
    beside = Path(sys.executable).parent / name
    path = shutil.which(name) or (str(beside) if beside.exists() else None)
    return path or sys.exit(f"livevlm: {name} is needed to build the kernels. Install it with: pip install {name}")


def kernel_table(log: str) -> str:
    """Registers and static shared memory of the CUDA kernels just compiled, from the lines of ptxas -v."""
    rows = []
    entry = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'.*?Used (\d+) registers([^\n]*)", re.DOTALL)
    for name, arch, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append((name, f"{arch:8} {registers:>9} {shared[1] if shared else 0:>8}"))
    if not rows or not shutil.which("c++filt"):
        return ""
    names = subprocess.run(["c++filt", *(name for name, _ in rows)], capture_output=True, text=True).stdout.splitlines()
    names = [name.replace("(anonymous namespace)::", "") for name in names]
    short = (re.sub(r"^void |livevlm::|\(.*\)$", "", name) for name in names)
    lines = sorted(f"  {figures}  {name}" for name, (_, figures) in zip(short, rows, strict=True))
    return "\n".join(["  arch     registers   shared  kernel", *lines])


class CMakeBuild(build_ext):
    """Builds all extensions with one CMake run, in a folder that stays: the next build only does what changed."""

    def build_extensions(self) -> None:
        cmake, jobs = tool("cmake"), os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        has_nvcc = CUDA != "OFF" and bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
        kind = "cuda" if has_nvcc else "cpu"  # CMake would remember in its cache that there is no nvcc
        tree = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-torch{torch_version()}-{kind}"
        configure = self.cmake(
            cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",  # under isolation it is somewhere else each time
            f"-DLIVEVLM_TORCH_DIR={torch_dir()}",
            f"-DLIVEVLM_CUDA={CUDA}",
            f"-DLIVEVLM_CUDA_ARCHS={ARCHS}",
            f"-DLIVEVLM_PYBIND11_INCLUDE={';'.join(pybind11_includes())}",
            f"-DLIVEVLM_PYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        )  # fmt: skip
        print(*re.findall(r"livevlm: .*", configure), sep="\n", flush=True)
        built = self.cmake(cmake, "--build", str(tree), "-j", jobs)
        if table := kernel_table(built):
            print(table, flush=True)
        target = Path(self.build_lib).resolve()
        for stale in target.glob("livevlm_kernels/*.so"):  # of an earlier build with other settings
            stale.unlink()
        self.cmake(cmake, "--install", str(tree), "--prefix", str(target))

    def cmake(self, *command: str) -> str:
        """Runs a step; its output is shown only if it fails."""
        step = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if step.returncode != 0:
            sys.exit(f"{step.stdout}\nlivevlm: this failed: {' '.join(command)}")
        return step.stdout


class Wheel(bdist_wheel):
    """Without _build_info nothing in the wheel depends on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if pybind11_includes() else ("py3", "none", platform)


def extensions() -> list[Extension]:
    kernels = [Extension("livevlm_kernels._C", sources=[], py_limited_api=True)]  # named _C.abi3.so
    return kernels + ([Extension("livevlm_kernels._build_info", sources=[])] if pybind11_includes() else [])


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
