# SPDX-License-Identifier: Apache-2.0
"""Which tests run where, and the same random numbers every time.

Tests marked `cuda` are skipped without a GPU. With TRITON_INTERPRET=1 in the environment only tests marked `interpret`
run: Triton reads the switch when a kernel is defined, so interpreted kernels need a pytest process of their own. In the
same way LIVEVLM_EMULATED, the path of the library that tests/emulation builds, selects tests marked `emulated`.
Both are slow: with LIVEVLM_SAMPLE=4 of every test's cases one in four is run, always the same ones, and at least one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kit

torch.set_num_threads(1)  # these tensors are small: more threads only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kit.SLOW:
        mark = "interpret" if kit.INTERPRETED else "emulated"
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker(mark)])
        items[:] = sampled([item for item in items if item.get_closest_marker(mark)])
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    every, seen = int(os.environ.get("LIVEVLM_SAMPLE", "1")), set()
    kept = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in seen or zlib.crc32(item.nodeid.encode()) % every == 0:
            kept.append(item)
        seen.add(test)
    return kept


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A generated video as a file."""
    from eval_kit import videos, write_mp4  # most tests need no OpenCV
    from eval_sets import SECONDS

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, videos(1, SECONDS)[0])
    return path.read_bytes()


@pytest.fixture
def lay(tmp_path: Path, clip: bytes) -> Callable[..., Path]:
    """Lays out a data set: an annotation file, and the same video under several names."""

    def lay(file: str, value: Any, *names: str) -> Path:
        from eval_kit import write_json

        write_json(tmp_path / file, value)
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(clip)
        return tmp_path

    return lay
