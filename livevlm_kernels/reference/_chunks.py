# SPDX-License-Identifier: Apache-2.0
"""Bounds the temporaries of the references: loops over slices whose number follows from shapes alone."""

from __future__ import annotations

MAX_ELEMENTS = 1 << 24  # of one temporary: 64 MiB in float32


def chunks(total: int, elements_each: int) -> list[slice]:
    """Slices of `range(total)`, each of as many items as fit into `MAX_ELEMENTS`, and of at least one."""
    step = max(1, MAX_ELEMENTS // max(1, elements_each))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
