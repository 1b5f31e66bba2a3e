# SPDX-License-Identifier: Apache-2.0
"""livevlm as its users use it, and the frames it is shown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livevlm.benchmark.subject import Subject
from livevlm.stream import Stream

HEIGHT, WIDTH = 360, 640
POOL = 16  # different frames
CLIP = 8  # frames a call, where it isn't what is varied


def frame_pool(count: int = POOL) -> Tensor:
    """Noise, uint8 `[count, 3, height, width]`, in host memory: nothing about it repeats or compresses."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)


class Live:
    """One stream over a subject."""

    def __init__(self, subject: Subject, **settings: Any) -> None:
        self.subject, self.device = subject, subject.device
        self.stream = Stream(subject.model, subject.processor, dataclasses.replace(subject.config, **settings))
        self.stream._stop = frozenset()  # random weights stop at random: answers must be as long as asked for
        self.pool = frame_pool()
        self._calls: dict[int, Tensor] = {}

    @property
    def num_frames(self) -> int:
        return self.stream.stats().num_frames

    def frames(self, count: int) -> Iterator[tuple[float, Tensor]]:
        """A source of so many frames, one a second."""
        return ((float(i), frame) for i, frame in zip(range(count), itertools.cycle(self.pool), strict=False))

    def watch(self, count: int, clip_frames: int) -> None:
        """Reads frames as they come from a source that is faster."""
        if count > 0:
            with self.stream.watching(self.frames(count), clip_frames=clip_frames, start=self.num_frames) as feed:
                feed.wait()

    def watch_file(self, path: Path, clip_frames: int) -> None:
        """Reads all frames of a file."""
        start = float(self.num_frames)
        with self.stream.watching(path, fps=None, clip_frames=clip_frames, start=start) as feed:
            feed.wait()

    def push(self, count: int) -> None:
        """Reads frames in one call."""
        if count not in self._calls:
            self._calls[count] = self.pool.repeat(-(-count // POOL), 1, 1, 1)[:count]
        self.stream.push(self._calls[count])

    def cycle(self, count: int) -> int:
        """Calls of so many frames from one compression of the memory to the next: what a frame costs is their mean."""
        cache = self.stream.cache
        if count >= cache.config.clip_frames:
            return 1
        return max(1, (cache.policy.most_tokens - cache.budget) // (count * cache.adapter.tokens_per_frame))

    def ask(self, num_tokens: int) -> tuple[float, float]:
        """TTFT in ms and ms a token after it, without looking for evidence."""
        answer = self.stream.ask(self.subject.question, max_new_tokens=num_tokens + 1, num_evidence=0)
        return answer.ttft * 1e3, (answer.seconds - answer.ttft) * 1e3 / max(1, answer.num_tokens - 1)
