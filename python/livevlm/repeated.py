# SPDX-License-Identifier: Apache-2.0
"""Launches that repeat themselves, as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from livevlm.graph_pool import GraphPool
from livevlm.replay import capture_stream, capturing

WARM = 2  # of a kind, launched eagerly first: libraries load their kernels and choose algorithms
TOO_FEW = "too few clips like this one yet"


Launches = tuple[Callable[[], object], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Captured:
    """Launches, and the tensors that they take what differs from."""

    replay: Callable[[], object]
    inputs: tuple[Tensor, ...]


class Repeated:
    """Launches by key, all of which refer to the same things: weights, memory.

    Args:
        capture: False keeps the launches as they are, in the place of a graph: for tests, on any device.

    """

    def __init__(self, pool: GraphPool, capture: bool) -> None:
        self._pool, self._capture, self._failed = pool, capture, ""
        self._of: tuple[object, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Lets go of all graphs: something they refer to is gone."""
        self.graphs: dict[Hashable, Captured] = {}
        self._seen: Counter[Hashable] = Counter()

    def refer_to(self, *things: object) -> None:
        """Graphs of other things are let go of."""
        if self._of != things:
            self.forget()
            self._of = things

    def find(self, key: Hashable, make: Callable[[], Launches], *, strict: bool) -> tuple[Captured | None, str]:
        """The graph for a key, or None to launch eagerly, and why.

        Args:
            make: gives the launches, and what they take their inputs from. They are not run on the GPU.
            strict: raise what a capture raises; else it is told, and nothing is captured any more.
        """
        if key not in self.graphs and not self._failed:
            self._seen[key] += 1
            if self._seen[key] <= WARM:
                return None, TOO_FEW
            try:
                launch, inputs = make()
                self.graphs[key] = Captured(self._recorded(launch, inputs[0]) if self._capture else launch, inputs)
            except Exception as error:
                if strict:
                    raise
                said = (str(error).strip() or "no message").splitlines()[0]
                self._failed = f"a clip could not be captured: {type(error).__name__}: {said}"
        return self.graphs.get(key), "" if key in self.graphs else self._failed

    def _recorded(self, launch: Callable[[], object], like: Tensor) -> Callable[[], object]:
        graph, side = torch.cuda.CUDAGraph(), capture_stream(like.device)
        # Other threads may use the GPU, to bring frames there: only this one's mistakes end the capture.
        capture = torch.cuda.graph(graph, pool=self._pool.handle(), stream=side, capture_error_mode="thread_local")
        with capturing(like.device):
            _set_up(side)
            with capture:
                launch()
        self._pool.add(graph)
        return graph.replay


def _set_up(stream: torch.cuda.Stream) -> None:
    """Makes the handles and workspaces of cuBLAS and cuDNN that this thread uses on a stream; a capture cannot."""
    with torch.cuda.stream(stream):
        x = torch.zeros((16, 16), dtype=torch.float16, device=stream.device)
        torch.addmm(x[0], x, x)
        F.conv2d(x[None, None], x[None, None])
