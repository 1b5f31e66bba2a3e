# SPDX-License-Identifier: Apache-2.0
"""What is trained when, by how much of the time is over."""

from __future__ import annotations

import math
from dataclasses import dataclass

CURRICULUM: tuple[tuple[float, tuple[int, ...]], ...] = (
    (0.00, (2, 4, 8)),
    (0.04, (4, 8, 16)),
    (0.10, (8, 16, 32)),
    (0.32, (16, 32, 64)),
    (0.50, (8, 16, 32, 64, 128)),
    (0.68, (16, 32, 64, 128, 256)),
    (0.85, (16, 64, 128, 256, 512, 1024)),
)
"""(share of the time that is over, lengths of videos in frames that are drawn from then on)."""


@dataclass(frozen=True)
class Schedule:
    """Settings by progress, which goes from 0 to 1.

    Attributes:
        longest: no longer videos are drawn.
        gaps: share of the batches of short videos with gaps between frames' positions, in the second half.
        warm_up: steps in which the learning rate rises.
    """

    longest: int = 1024
    gaps: float = 0.15
    warm_up: int = 200

    def lengths(self, progress: float) -> list[int]:
        lengths = [lengths for start, lengths in CURRICULUM if progress >= start][-1]
        return [length for length in lengths if length <= self.longest] or [self.longest]

    def learning_rate(self, progress: float, step: int) -> float:
        """As a share of the highest: up in the first steps, then down a cosine to 4 %."""
        return min(1.0, (step + 1) / self.warm_up) * (0.04 + 0.48 * (1 + math.cos(math.pi * min(1.0, progress))))

    def label_weight(self, progress: float) -> float:
        """Weight of the loss on what each cell shows; never off, or shapes would be forgotten."""
        return 0.5 * max(0.1, 1 - progress / 0.3)

    def gap_share(self, progress: float) -> float:
        return self.gaps if progress > 0.45 else 0.0
