# SPDX-License-Identifier: Apache-2.0
"""The KV memory of one stream: preallocated blocks for all layers, and what is known about each token in them.

Layout of every layer's slots (one token a slot, `block_size` slots a block):

    | empty | prompt | video tokens kept, oldest first | tokens being read now: a clip, or a question |
    0     base     video_start                      video_end                                         end

The prompt is pushed against a block boundary, so that blocks of video tokens start at `video_start`. Keys are stored
un-rotated. Tokens behind `video_end` are provisional: `rollback` forgets them, and a failure while they are written
leaves everything before `video_end` as it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from livevlm_kernels import compact_tokens
from livevlm_kernels.layer_steps import describe_tokens

GROWTH = 256  # slots are added in multiples of this, rounded up to whole blocks
_VERSIONS = itertools.count(1)


@dataclass(frozen=True)
class KVShape:
    """What a model's cache looks like."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of all layers for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Memory:
    """Keys, values and per-token facts of one stream, for all layers at once.

    Attributes:
        k, v: `[num_layers, num_slots, num_kv_heads, head_dim]` in the model's dtype; `k` un-rotated.
        position: place of the token in the stream, `[num_layers, num_slots]` int32; -1 in an empty slot.
        frame: index of the frame the token came from, int32; -1 for text.
        slot: patch slot of the token in its frame, int32; -1 for text and merged tokens.
        time: seconds since the start of the stream, float64.
        size: how many tokens are merged into this one, float32.
        block_numbers: of all blocks, in order, int32: a block table that names everything.
        damaged: a failure tore the content apart; nothing but a new memory helps.
        version: another number each time that tensors are allocated, in any memory: who keeps addresses looks here.
        num_moves: how often kept tokens were rewritten: who keeps what follows from them looks here.
    """

    def __init__(self, shape: KVShape, block_size: int, num_slots: int) -> None:
        self.shape = shape
        self.block_size = block_size
        self.base = self.video_start = self.video_end = self.end = 0
        self.peak_bytes = self.num_moves = 0
        self.damaged = False  # an interrupt tore it; only a reset helps
        self._moved = False  # kept tokens were rewritten since the last commit
        self._allocate(num_slots)

    # ---------------------------------------------------------------- facts
    @property
    def num_slots(self) -> int:
        return self.k.shape[1]

    @property
    def num_prompt_tokens(self) -> int:
        return self.video_start - self.base

    @property
    def num_video_tokens(self) -> int:
        return self.video_end - self.video_start

    @property
    def num_tokens(self) -> int:
        """Committed tokens of a layer: prompt and video."""
        return self.video_end - self.base

    @property
    def num_new_tokens(self) -> int:
        """Provisional tokens: the clip or the question being read."""
        return self.end - self.video_end

    @property
    def bytes_used(self) -> int:
        """Bytes of keys and values of the committed tokens of all layers."""
        return self.num_tokens * self.shape.bytes_per_token

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all tensors held, whether slots are in use or not."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.k, self.v, self.position, self.frame, self.slot, self.time, self.size)

    def blocks(self, tensor: Tensor, layer: int) -> Tensor:
        """One layer of one of `tensors` as a pool of blocks, `[num_blocks, block_size, ...]`; a view."""
        return tensor[layer].unflatten(0, (-1, self.block_size))

    def video(self, tensor: Tensor) -> Tensor:
        """The part of one of `tensors` that holds video tokens, including a clip that is not committed yet."""
        return tensor[:, self.video_start : self.end]

    # ---------------------------------------------------------------- growing
    def _allocate(self, num_slots: int) -> None:
        """Makes room for `num_slots` slots and takes the present content over; on an error nothing has changed."""
        shape = self.shape
        num_blocks = math.ceil(math.ceil(num_slots / GROWTH) * GROWTH / self.block_size)
        slots = (shape.num_layers, num_blocks * self.block_size)
        kv = (*slots, shape.num_kv_heads, shape.head_dim)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            new = (
                torch.zeros(kv, dtype=shape.dtype, device=shape.device),
                torch.zeros(kv, dtype=shape.dtype, device=shape.device),
                torch.full(slots, -1, dtype=torch.int32, device=shape.device),
                torch.full(slots, -1, dtype=torch.int32, device=shape.device),
                torch.full(slots, -1, dtype=torch.int32, device=shape.device),
                torch.zeros(slots, dtype=torch.float64, device=shape.device),
                torch.ones(slots, dtype=torch.float32, device=shape.device),
            )
            numbers = torch.arange(num_blocks, dtype=torch.int32, device=shape.device)
            if self.end:
                for tensor, old in zip(new, self.tensors, strict=True):
                    tensor[:, : self.end] = old[:, : self.end]
        self.k, self.v, self.position, self.frame, self.slot, self.time, self.size = new
        self.block_numbers = numbers
        self.version = next(_VERSIONS)
        self.peak_bytes = max(self.peak_bytes, self.bytes_allocated)

    def reserve(self, num_new: int) -> None:
        """Makes room for `num_new` more provisional tokens. Grows by half if it can, so that growing stays cheap.

        Raises:
            torch.OutOfMemoryError: there is no such room; nothing has changed.
        """
        needed = self.end + num_new
        if needed <= self.num_slots:
            return
        try:
            self._allocate(max(needed, self.num_slots * 3 // 2))
        except torch.OutOfMemoryError:
            try:
                self._allocate(needed)
            except torch.OutOfMemoryError as error:
                more = needed * self.shape.bytes_per_token / 2**30
                raise torch.OutOfMemoryError(
                    f"no room for {needed} tokens of keys and values, {more:.2f} GiB, beside the {self.end} that are "
                    f"there and stay. Give Config a policy that forgets, or a smaller budget. ({error})"
                ) from error

    # ---------------------------------------------------------------- writing
    def open(self, num_new: int) -> slice:
        """Slots for `num_new` provisional tokens: every layer is to write keys and values there."""
        self.reserve(num_new)
        where = slice(self.end, self.end + num_new)
        self.end = where.stop
        return where

    def begin(self, num_new: int, first_position: int) -> slice:
        """`open` for text, whose place in the stream starts at `first_position`."""
        where = self.open(num_new)
        self.place_text(where, first_position)
        return where

    def place_text(self, where: slice, first_position: int) -> None:
        """Says which place in the stream the text in these slots has."""
        count = where.stop - where.start
        self.position[:, where] = torch.arange(count, device=self.shape.device) + first_position

    def rollback(self) -> None:
        """Forgets all provisional tokens."""
        if self._moved:  # kept tokens were rewritten for a clip that failed afterwards
            self.damaged = True
        self.end = self.video_end

    def commit_prompt(self) -> None:
        """Turns the provisional tokens into the prompt. The memory must hold nothing else."""
        count, base = self.end, -self.end % self.block_size
        self.reserve(base)
        for tensor in self.tensors:
            tensor[:, base : base + count] = tensor[:, :count].clone()
        self.position[:, :base] = -1
        self.base = base
        self.video_start = self.video_end = self.end = base + count

    def describe(self, facts: Tensor, tokens_per_frame: int) -> None:
        """Records what a clip's tokens are, in slots that `facts`, on the device, tell: see `describe_tokens`."""
        describe_tokens(facts, tokens_per_frame, self.tensors[2:])

    def commit_video(self) -> None:
        """The provisional tokens stay: they are part of the video memory from now on."""
        self.video_end = self.end
        self._moved = False

    # ---------------------------------------------------------------- evicting
    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around what rewrites kept tokens: it must write everything or, on an error, nothing.

        An interrupt in the middle leaves the memory damaged, and so does a failure between this and `commit_video`.
        """
        try:
            yield
        except BaseException as error:
            self.damaged |= not isinstance(error, Exception)
            raise
        finally:
            self.num_moves += 1
        self._moved = True

    def keep(self, indices: Tensor) -> None:
        """Keeps only the given video tokens (a provisional clip included), in place, for all layers.

        Args:
            indices: `[num_layers, num_kept]` int32, sorted, relative to `video_start`, none missing.
        """
        with self.moving():
            compact_tokens([self.video(t) for t in self.tensors], indices)
            self.shrink(indices.shape[-1])

    def shrink(self, num_tokens: int) -> None:
        """Only the first `num_tokens` video tokens are left: what was kept has been moved there."""
        self.video_end = self.end = self.video_start + num_tokens

    def replace(self, start: int, parts: tuple[Tensor, ...]) -> None:
        """Puts other tokens in the place of all video tokens from slot `start` on.

        Args:
            start: first slot replaced, at least `video_start`.
            parts: the new content of `tensors`, each `[num_layers, num_new, ...]`, no views of them.
        """
        stop = start + parts[0].shape[1]
        self.reserve(stop - self.end)
        with self.moving():
            for tensor, part in zip(self.tensors, parts, strict=True):
                tensor[:, start:stop] = part
            self.video_end = self.end = stop
