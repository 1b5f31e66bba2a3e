# SPDX-License-Identifier: Apache-2.0
"""Brings single frames to the model's device and size, away from the thread and the GPU stream that run the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from livevlm.errors import FrameError
from livevlm.frames import as_frames
from livevlm.processing import Processor

NUM_BUFFERS = 4  # of pinned memory: so many frames may be on their way to the GPU


@dataclass(frozen=True)
class Staged:
    """A frame, uint8 `[1, 3, image_size, image_size]`, there once `ready` has happened on the GPU."""

    pixels: Tensor
    ready: torch.cuda.Event | None


class Staging:
    """Used by one thread. All frames must have one size, that of the first or `size`."""

    def __init__(
        self, processor: Processor, image_size: int, device: torch.device, size: tuple[int, ...] | None = None
    ) -> None:
        self.processor, self.image_size, self.device, self.size = processor, image_size, device, size
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def __call__(self, frame: Any) -> Staged:
        """One frame, in any form that `as_frames` takes.

        Raises:
            FrameError: it is unusable, or has another size than those before.
        """
        pixels = as_frames(frame)
        size = tuple(pixels.shape[-2:])
        if pixels.shape[0] != 1:
            raise FrameError(f"a source must give one frame at a time, not {pixels.shape[0]}")
        if self.size is not None and size != self.size:
            raise FrameError(f"frames have size {size} but the stream's are {self.size}; they cannot change within one")
        self.size = size
        if self._stream is None:
            return Staged(self.processor.resized(pixels, self.image_size), None)
        with torch.cuda.stream(self._stream):
            moved = self._moved(pixels)
            staged = Staged(self.processor.resized(moved, self.image_size), torch.cuda.Event())
            assert staged.ready is not None
            staged.ready.record()
        return staged

    def _moved(self, pixels: Tensor) -> Tensor:
        """To the device, through one of the pinned buffers in turn, once what it held before has left it."""
        if pixels.is_cuda:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.default_stream(self.device))
            return pixels.to(self.device)
        if len(self._buffers) < NUM_BUFFERS:
            # As a decoder leaves it, channels last: then filling it is one plain copy.
            shape = (1, *pixels.shape[-2:], 3)
            self._buffers.append((torch.empty(shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
        buffer, left = self._buffers[self._turn % len(self._buffers)]
        self._turn += 1
        left.synchronize()
        buffer.copy_(pixels.permute(0, 2, 3, 1))
        moved = buffer.to(self.device, non_blocking=True)
        left.record()
        return moved.permute(0, 3, 1, 2)


def clip_of(frames: Sequence[Staged]) -> Tensor:
    """Staged frames as one clip, on the GPU stream of the caller."""
    for frame in frames:
        if frame.ready is not None:
            here = torch.cuda.current_stream(frame.pixels.device)
            here.wait_event(frame.ready)
            frame.pixels.record_stream(here)  # not to be used anew before the clip has been put together
    return torch.cat([frame.pixels for frame in frames])
