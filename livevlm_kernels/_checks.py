# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Each error names the argument, its value and what is allowed.

Everything here reads shapes and dtypes only: no check looks at tensor data, so none synchronises with a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from livevlm_kernels.errors import ArgumentError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)


def tensor(name: str, value: object, *, ndim: int | None = None, min_ndim: int = 0) -> Tensor:
    """`value` as a tensor of exactly `ndim` or at least `min_ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if ndim is not None and value.dim() != ndim:
        raise ArgumentError(f"{name} must have {ndim} dimensions; its shape is {tuple(value.shape)}")
    if value.dim() < min_ndim:
        raise ArgumentError(f"{name} must have at least {min_ndim} dimensions; its shape is {tuple(value.shape)}")
    return value


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ArgumentError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; allowed: {names}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ArgumentError(f"{name} is on {value.device} but {other_name} is on {other.device}; they must agree")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """`value.shape == expected`; `meaning` spells the dimensions, e.g. "[batch, seq_len]"."""
    if tuple(value.shape) != tuple(expected):
        raise ArgumentError(f"{name} must have shape {meaning} = {tuple(expected)}, not {tuple(value.shape)}")


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    if not value >= low:  # also catches NaN
        raise ArgumentError(f"{name}={value} must be at least {low}")


def between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ArgumentError(f"{name}={value} must lie between {low} and {high}")


def collapse(name: str, value: Tensor, trailing: int) -> Tensor:
    """All leading dimensions of `value` as one batch dimension, without a copy: `[*, t...]` -> `[B, t...]`."""
    lead = value.dim() - trailing
    if lead == 1:
        return value
    if lead == 0:
        return value.unsqueeze(0)
    try:
        return value.view(-1, *value.shape[lead:])
    except RuntimeError:
        raise ArgumentError(
            f"{name}: its leading dimensions {tuple(value.shape[:lead])} with strides {value.stride()[:lead]} "
            "do not collapse into one without a copy; pass a layout in which they do, or call .contiguous()"
        ) from None


def seq_lens(value: Tensor | None, batch: int, like_name: str, like: Tensor, name: str = "seq_lens") -> Tensor | None:
    """`value`, one token count or index a sequence, flattened to [batch] int32 on the device of `like`; or None."""
    if value is None:
        return None
    tensor(name, value)
    dtype(name, value, INTS)
    same_device(name, value, like_name, like)
    if value.numel() != batch:
        raise ArgumentError(f"{name} has {value.numel()} entries; the leading dimensions of {like_name} give {batch}")
    return value.reshape(batch).to(torch.int32).contiguous()
