# SPDX-License-Identifier: Apache-2.0
"""The whole training step as CUDA graphs, one for each shape of a batch; launches would take half of the time."""

from __future__ import annotations

import torch

from batches import Batch, Shape
from learner import Learner

EAGER_STEPS = 3
"""Steps of each shape before it is captured, so that libraries and the optimizer have made what they keep."""


class GraphedSteps:
    """Takes training steps: eagerly at first, then by replaying the shape's graph. Every call trains on its batch."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.stream = torch.cuda.Stream()
        # The graphs share memory: none runs beside another, and all that outlives a replay was made before.
        self.pool = torch.cuda.graph_pool_handle()
        self.taken: dict[Shape, int] = {}
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Batch]] = {}

    def __call__(self, shape: Shape, batch: Batch) -> None:
        if shape in self.captured:
            graph, inputs = self.captured[shape]
            inputs.copy_(batch)
            graph.replay()
        elif self.taken.get(shape, 0) < EAGER_STEPS:
            self.taken[shape] = self.taken.get(shape, 0) + 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.learner.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            torch.cuda.synchronize()  # the batch must outlive the side stream's use of it
        else:
            inputs, graph = batch.clone(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool):
                self.learner.step(inputs)
            self.captured[shape] = graph, inputs
            graph.replay()
