# SPDX-License-Identifier: Apache-2.0
"""What each patch slot has looked like so far, on average."""

from __future__ import annotations

import torch
from torch import Tensor


def previous_in_slot(slots: Tensor) -> Tensor:
    """Index of the last earlier token with the same slot in its row; -1 if there is none, or the slot is negative.

    `slots` is `[num_rows, n]`, of any integers; the result int32 `[num_rows, n]`.
    """
    slot, order = slots.sort(stable=True, dim=-1)
    same = (slot[:, 1:] == slot[:, :-1]) & (slot[:, 1:] >= 0)
    before = torch.where(same, order[:, :-1], -1)
    return torch.full_like(order, -1).scatter(1, order[:, 1:], before).int()


class SlotHistory:
    """Mean value of every patch slot over all frames of a stream, in each layer.

    A clip counts from when it is `observe`d; `rollback` forgets it again, `commit` makes it stay.
    """

    def __init__(self, tokens_per_frame: int) -> None:
        self.tokens_per_frame, self.num_frames = tokens_per_frame, 0
        self._mean: Tensor | None = None
        self._new: tuple[Tensor, int] | None = None  # the mean with the clip that is not committed yet

    def observe(self, v: Tensor) -> None:
        """Takes the values of whole frames, `[num_layers, num_tokens, num_kv_heads, head_dim]`, into account."""
        frames = v.unflatten(1, (-1, self.tokens_per_frame))
        count = frames.shape[1]
        mean = frames.mean(1, dtype=torch.float32)
        if self._mean is not None:
            mean = self._mean + (mean - self._mean) * (count / (self.num_frames + count))
        self._new = mean, self.num_frames + count

    def commit(self) -> None:
        if self._new is not None:
            (self._mean, self.num_frames), self._new = self._new, None

    def rollback(self) -> None:
        self._new = None

    def mean(self) -> Tensor:
        """float32 `[num_layers, tokens_per_frame, num_kv_heads, head_dim]`."""
        mean = self._mean if self._new is None else self._new[0]
        assert mean is not None, "a frame was seen"
        return mean
