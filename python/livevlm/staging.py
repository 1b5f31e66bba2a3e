# SPDX-License-Identifier: Apache-2.0
"""Brings single frames to the model's device and size, away from the thread and the GPU stream that run the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from livevlm.errors import FrameError
from livevlm.frames import as_frames
from livevlm.processing import Processor

ALONE = (
    2**23
)  # bytes that one thread copies: torch would wake many for it, and a busy one of these can take milliseconds
NUM_BUFFERS = 4  # of pinned memory: so many frames may be on their way to the GPU


class Pinned:
    """Brings frames to a GPU through buffers of pinned memory, in turn: from there a copy waits for nothing."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self.device, self._turn = device, 0
        self._buffers: list[tuple[Tensor, torch.cuda.Event | None]] = [(torch.empty(0), None)] * num_buffers

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 `[num_frames, 3, height, width]` of the CPU, in the order that they have in memory."""
        turn = self._turn = (self._turn + 1) % len(self._buffers)
        buffer, left = self._buffers[turn]
        if left is not None:
            left.synchronize()  # what it held before has left it
        if buffer.numel() < frames.numel():
            buffer = torch.empty(frames.numel(), dtype=torch.uint8, pin_memory=True)
        last = frames.permute(0, 2, 3, 1)  # decoders leave channels last: then filling the buffer is one plain copy
        is_last = last.is_contiguous()
        source = last if is_last else frames
        part = buffer[: frames.numel()].view(source.shape)
        if part.numel() <= ALONE:
            np.copyto(part.numpy(), source.numpy())
        else:
            part.copy_(source)
        moved = part.to(self.device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._buffers[turn] = (buffer, event)
        return moved.permute(0, 3, 1, 2) if is_last else moved


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
        self._pinned = Pinned(device, NUM_BUFFERS)

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
        if not pixels.is_cuda:
            return self._pinned(pixels)
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.default_stream(self.device))
        return pixels.to(self.device)


def clip_of(frames: Sequence[Staged]) -> Tensor:
    """Staged frames as one clip, on the GPU stream of the caller."""
    for frame in frames:
        if frame.ready is not None:
            here = torch.cuda.current_stream(frame.pixels.device)
            here.wait_event(frame.ready)
            frame.pixels.record_stream(here)  # not to be used anew before the clip has been put together
    return torch.cat([frame.pixels for frame in frames])
