# SPDX-License-Identifier: Apache-2.0
"""Which tests run where, and the same random numbers every time.

Tests marked `cuda` are skipped without a GPU. With TRITON_INTERPRET=1 in the environment only tests marked `interpret`
run: Triton reads the switch when a kernel is defined, so interpreted kernels need a pytest process of their own. In the
same way LIVEVLM_EMULATED, the path of the library that tests/emulation builds, selects tests marked `emulated`.
"""

from __future__ import annotations

import pytest
import torch

import kit

torch.set_num_threads(1)  # these tensors are small: more threads only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kit.SLOW:
        mark = "interpret" if kit.INTERPRETED else "emulated"
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker(mark)])
        items[:] = [item for item in items if item.get_closest_marker(mark)]
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
