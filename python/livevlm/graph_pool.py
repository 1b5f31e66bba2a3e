# SPDX-License-Identifier: Apache-2.0
"""GPU memory that all CUDA graphs of a cache use in turn."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class GraphPool:
    """Clips and questions take turns, and what a pass leaves behind lies in tensors made outside of any graph.

    So the memory that a graph needs while it runs may be that of all others, replayed in whatever order.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle: Any = None

    def handle(self) -> Any:
        """For the next capture. torch lets go of a pool with the last graph in it; then there is another one."""
        if self._handle is None or not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def add(self, graph: torch.cuda.CUDAGraph) -> None:
        """A graph was captured with `handle`."""
        self._graphs.add(graph)
