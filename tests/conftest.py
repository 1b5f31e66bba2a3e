# SPDX-License-Identifier: Apache-2.0
"""Which tests run where, and the same random numbers every time.

Tests marked `cuda` are skipped without a GPU. With TRITON_INTERPRET=1 in the environment only tests marked `interpret`
run: Triton reads the switch when a kernel is defined, so interpreted kernels need a pytest process of their own.
"""

from __future__ import annotations

import pytest
import torch

import kit

torch.set_num_threads(1)  # these tensors are small: more threads only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kit.INTERPRETED:
        other = [item for item in items if "interpret" not in item.keywords]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if "interpret" in item.keywords]
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
