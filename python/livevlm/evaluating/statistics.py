# SPDX-License-Identifier: Apache-2.0
"""Accuracies and their intervals. Questions about one video are correlated, so the video is the unit that is drawn.

An accuracy is a ratio of sums over videos: right answers by questions asked, of a kind; the headline is the mean of
such ratios. Its variance follows from what each video adds (the ratio estimator's linearisation): with r_v of n_v
right in video v of V, and A = sum r / sum n, that is V (r_v - A n_v) / sum n, of mean 0. The mean of ratios, and the
difference of two settings over the same videos, add up in the same way, so the correlation of two settings that see
the same videos is taken out. Near 0 or 1, or with a handful of videos, the intervals are too narrow: where all answers
are right, they have no width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value, and half the width of its 95 % interval; NaN for a single video."""

    value: float
    half: float


def t95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: Cornish and Fisher's expansion, within 1 % from 3 degrees on."""
    z = 1.959964
    n = max(1, degrees)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _mean_of_ratios(asked: Counts, right: Counts) -> tuple[float, Counts]:
    """The mean over kinds of right by asked, `[num_videos, num_kinds]` each, and what each video adds to it."""
    total = asked.sum(0)
    there = total > 0  # a kind that no video was asked says nothing
    if not there.any():
        return math.nan, np.zeros(len(asked))
    asked, right, total = asked[:, there], right[:, there], total[there]
    accuracy = right.sum(0) / total
    return float(accuracy.mean()), len(asked) * ((right - accuracy * asked) / total).mean(1)


def _half(parts: Counts) -> float:
    count = len(parts)
    if count < 2:
        return math.nan
    return t95(count - 1) * math.sqrt(float((parts**2).sum()) / (count * (count - 1)))


def accuracy(asked: Counts, right: Counts) -> Estimate:
    """The mean of the kinds' accuracies, from counts `[num_videos, num_kinds]`."""
    value, parts = _mean_of_ratios(asked, right)
    return Estimate(value, _half(parts))


def difference(asked: Counts, right: Counts, other_right: Counts) -> Estimate:
    """How much higher the accuracy is than another setting's that was asked the same questions."""
    value, parts = _mean_of_ratios(asked, right)
    other, other_parts = _mean_of_ratios(asked, other_right)
    return Estimate(value - other, _half(parts - other_parts))
