# SPDX-License-Identifier: Apache-2.0
"""One way of watching a video: the method, or the control that keeps only the newest frames."""

from __future__ import annotations

import dataclasses
import gc
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from livevlm.config import Config
from livevlm.staging import Staged, clip_of
from livevlm.stream import Stream

NewStream = Callable[[Config], Stream]
METHOD, CONTROL = "method", "control"


def control_config(config: Config) -> Config:
    """The newest frames in the same budget, all of them attended to."""
    return dataclasses.replace(config, policy="recent", retrieval="none")


def free_streams() -> None:
    """Gives back what streams no longer in use hold of a GPU: they refer to themselves, so Python would do it late."""
    if torch.cuda.is_available():
        gc.collect()


class Viewer:
    """Watches, and gives the stream that a question at some moment is put to.

    Args:
        context: None: one stream sees everything. Else a question is put to a stream of its own, which has seen only
            so many seconds before it.
    """

    def __init__(self, role: str, config: Config, new_stream: NewStream, context: float | None) -> None:
        self.role, self.config, self.context = role, config, context
        self._new_stream = new_stream
        self._stream = new_stream(config) if context is None else None
        self._newest: deque[tuple[float, Staged]] = deque()
        self._window: Stream | None = None

    def read(self, clip: Tensor, frames: Sequence[Staged], times: Sequence[float]) -> None:
        """The next frames; `clip` is all of them in one tensor."""
        if self._stream is not None:
            self._stream.read_staged(clip, times)
            return
        assert self.context is not None
        self._newest.extend(zip(times, frames, strict=True))
        while len(self._newest) > 1 and self._newest[0][0] < times[-1] - self.context:
            self._newest.popleft()
        self._window = None

    def stream(self, moment: float) -> Stream:
        """The stream for a question at this moment; its memory is the same after any question."""
        if self._stream is not None:
            return self._stream
        if self._window is None:
            assert self.context is not None
            while len(self._newest) > 1 and self._newest[0][0] < moment - self.context:
                self._newest.popleft()
            free_streams()
            self._window = self._new_stream(self.config)
            size = self.config.clip_frames
            newest = list(self._newest)
            for first in range(0, len(newest), size):
                part = newest[first : first + size]
                self._window.read_staged(clip_of([frame for _, frame in part]), [time for time, _ in part])
        return self._window
