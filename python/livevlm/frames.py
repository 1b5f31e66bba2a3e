# SPDX-License-Identifier: Apache-2.0
"""Whatever a user has as frames, as one uint8 tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from livevlm.errors import FrameError


def as_frames(frames: Any) -> Tensor:
    """Frames as a uint8 tensor `[num_frames, 3, height, width]`, on the device they are on.

    Args:
        frames: a tensor or array `[num_frames, 3, height, width]` or `[num_frames, height, width, 3]`, uint8, or
            floating point in 0..1; one such frame without the first dimension; or a sequence of frames, each a
            tensor, an array or a PIL image.

    Raises:
        FrameError: another shape or type, no frames, frames of different sizes, or values that are NaN, infinite
            or outside 0..1.
    """
    if isinstance(frames, Sequence) and not isinstance(frames, str | bytes):
        if not frames:
            raise FrameError("frames is empty; push at least one frame")
        parts = [as_frames(frame) for frame in frames]
        sizes = sorted({tuple(part.shape[-2:]) for part in parts})
        if len(sizes) > 1:
            raise FrameError(f"frames have different sizes {sizes}; allowed: one size (height, width) per stream")
        return torch.cat(parts)
    if isinstance(frames, Tensor):
        tensor = frames.detach()
    else:
        try:
            array = np.asarray(frames.convert("RGB") if hasattr(frames, "convert") else frames)
            tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch wants them writable
        except (TypeError, ValueError):
            raise FrameError(
                f"frames is a {type(frames).__name__}; allowed: tensors, arrays, PIL images, or sequences of them"
            ) from None
    return _as_uint8(_as_channels_first(tensor))


def _as_channels_first(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.dim() == 3:
        tensor = tensor[None]
    if tensor.dim() == 4 and tensor.shape[1] != 3 and tensor.shape[3] == 3:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.dim() != 4 or tensor.shape[1] != 3:
        raise FrameError(
            f"frames have shape {shape}; allowed: [num_frames, 3, height, width] or [num_frames, height, width, 3]"
        )
    if not tensor.numel():
        raise FrameError(f"frames have shape {shape}, which holds no pixel; push at least one frame")
    return tensor


def _as_uint8(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise FrameError(f"frames have dtype {tensor.dtype}; allowed: uint8, or floating point in 0..1")
    if not bool(torch.isfinite(tensor).all()):
        raise FrameError("frames hold NaN or infinite values; allowed: uint8, or floating point in 0..1")
    low, high = float(tensor.min()), float(tensor.max())
    if low < 0 or high > 1:
        raise FrameError(f"floating point frames lie in {low:.3g}..{high:.3g}; allowed: 0..1")
    return (tensor.float() * 255).round().to(torch.uint8)
