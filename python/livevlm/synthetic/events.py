# SPDX-License-Identifier: Apache-2.0
"""What happens in a synthetic video: which object is in which cell, and when.

An event is one object (a shape and a colour) that appears at some frame, stays or moves along a row or a
column for 1 to 30 frames, and goes.  Where two events would share a cell, the one that appeared later hides
the other.  The truth used by the questions is computed from what is *visible*, never from what is hidden.

No event outlives :data:`MAX_LIFE` frames, so its path is stored by age (``[N, MAX_LIFE]``) and memory grows
linearly with the length of the video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from livevlm.synthetic.vocabulary import COLOURS, GRID, SHAPES, TOKENS_PER_FRAME

MAX_LIFE = 30
"""Longest life of an event in frames."""
NUM_SIZES = 3
"""Sizes an object can have."""
MAX_SHIFT = 2
"""Largest offset of an object from the middle of its cell, in pixels, along each axis."""
NUM_VARIANTS = NUM_SIZES * (2 * MAX_SHIFT + 1) ** 2
"""Size and offset combinations of one shape."""


@dataclass(frozen=True, eq=False)
class Events:
    """The events of a batch of B videos, or of one video when the leading ``B`` is dropped.

    N is the number of events, F the number of frames, and A is ``MAX_LIFE``.
    """

    shape: torch.Tensor
    """int64 [B, N]: index into ``SHAPES``."""
    colour: torch.Tensor
    """int64 [B, N]: index into ``COLOURS``."""
    start: torch.Tensor
    """int64 [B, N]: first frame of the event, all different within a video."""
    cell: torch.Tensor
    """int64 [B, N, A]: index into ``CELLS`` at each age in frames."""
    visible: torch.Tensor
    """bool [B, N, A]: whether the object can be seen at each age."""
    occupant: torch.Tensor
    """int64 [B, F, 16]: the event seen in each cell of each frame, or -1."""
    variant: torch.Tensor
    """int64 [B, N]: which size and offset the object is drawn with."""
    tint: torch.Tensor
    """float32 [B, N, 3]: offset added to the RGB colour, -0.08 to 0.08."""

    def video(self, index: int) -> Events:
        """Return the events of one video, without the batch dimension."""
        return Events(**{name: value[index] for name, value in vars(self).items()})

    def videos(self, which: slice) -> Events:
        """Return some of the videos, as a batch."""
        return Events(**{name: value[which] for name, value in vars(self).items()})

    def first_visible(self) -> torch.Tensor:
        """Return int64 [..., N]: first frame that shows each event, or F for one that never shows."""
        return torch.where(self.visible, self._frames(), self.occupant.shape[-2]).amin(-1)

    def last_visible(self, frames_seen: torch.Tensor) -> torch.Tensor:
        """Return int64 [..., N, K]: last frame that shows each event among the first ``frames_seen`` [K], or -1."""
        last = torch.where(self.visible, self._frames(), -1).cummax(-1).values
        return torch.where(self.ages(frames_seen) >= 0, self.at_age(last, self.ages(frames_seen)), -1)

    def ages(self, frames_seen: torch.Tensor) -> torch.Tensor:
        """Return int64 [..., N, K]: age of each event in the last of ``frames_seen`` [K] frames; below 0: to come."""
        return frames_seen - 1 - self.start[..., None]

    @staticmethod
    def at_age(values: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        """Look up ``values`` [..., N, A] at ``age`` [..., N, K], brought into range."""
        return values.gather(-1, age.clamp(0, MAX_LIFE - 1))

    def _frames(self) -> torch.Tensor:
        """Return int64 [..., N, A]: the frame of each age."""
        return self.start[..., None] + torch.arange(MAX_LIFE, device=self.start.device)


def draw_events(
    num_videos: int, num_frames: int, rng: torch.Generator, *, repeats: bool = False, walks: bool = False
) -> Events:
    """Draw the events of ``num_videos`` videos of ``num_frames`` frames each, on the device of ``rng``.

    About one event starts every 3.5 frames.  Up to three shapes and three colours are "needles": they occur
    once in the video and stay for one to three frames.

    repeats: two pairs of shape and colour come three or four times in the whole video, however long it is.
    walks: most of the colours that are needles move, and stay for three to eight frames.

    Both change some events of the video that the same seed gives without them.
    """
    b, f = num_videos, num_frames
    n = max(2, min(f, round(f / 3.5) + 1)) if f > 1 else 1
    device = rng.device

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=rng, device=device)

    def integer(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=rng, device=device)

    # Shapes and colours: the first three of each permutation are kept for the needles.
    needles = min(3, max(1, n // 4))
    shapes = uniform(b, len(SHAPES)).argsort(-1)
    colours = uniform(b, len(COLOURS)).argsort(-1)
    shape = shapes.gather(1, 3 + integer(len(SHAPES) - 3, b, n))
    colour = colours.gather(1, 3 + integer(len(COLOURS) - 3, b, n))
    shape[:, :needles] = shapes[:, : min(n, needles)]
    colour[:, :needles] = integer(len(COLOURS), b, needles)
    if n >= 2 * needles:
        colour[:, needles : 2 * needles] = colours[:, :needles]
    is_needle = (torch.arange(n, device=device) < 2 * needles).expand(b, n)

    # Time: distinct first frames, then how long each event lasts.
    start = uniform(b, f).topk(n, dim=1).indices
    which, length = uniform(b, n), uniform(b, n)
    longer = torch.where(which < 0.8, 3 + length * 8, 10 + length * 20)
    life = torch.where(which < 0.4, 1 + length * 3, longer).long()
    life = torch.where(is_needle, 1 + integer(3, b, n), life)

    # Path: some events move one cell every one or two frames, along a row or a column, up to the edge.
    moves = uniform(b, n) < torch.where(is_needle, 0.2, 0.35)
    down, sign, pace = integer(2, b, n), integer(2, b, n) * 2 - 1, 1 + integer(2, b, n)
    row, column = integer(GRID, b, n), integer(GRID, b, n)
    variant = integer(NUM_VARIANTS, b, n)
    tint = (uniform(b, n, 3) - 0.5) * 0.16

    # Drawn last, so that all else stays what the seed gives without them.
    if repeats:
        _repeat(shape, colour, shapes, colours, uniform(b, n).masked_fill(is_needle, -1), 3 + integer(2, b, 2))
    if walks:
        walk = (uniform(b, n) < 0.8) & is_needle & (torch.arange(n, device=device) >= needles)
        moves, life = moves | walk, torch.where(walk, 3 + integer(6, b, n), life)
        pace = pace.masked_fill(walk, 1)

    steps = torch.arange(MAX_LIFE, device=device) // pace[..., None]
    rows = (row[..., None] + (moves * down * sign)[..., None] * steps).clamp(0, GRID - 1)
    columns = (column[..., None] + (moves * (1 - down) * sign)[..., None] * steps).clamp(0, GRID - 1)
    cell = rows * GRID + columns
    visible, occupant = _resolve(start, life, cell, num_frames)
    return Events(shape, colour, start, cell, visible, occupant, variant, tint)


def _repeat(
    shape: torch.Tensor,
    colour: torch.Tensor,
    shapes: torch.Tensor,
    colours: torch.Tensor,
    preference: torch.Tensor,
    times: torch.Tensor,
) -> None:
    """Make two pairs come ``times`` [B, 2] times each: in place, by giving them to events of highest ``preference``.

    Other events of the pairs get another colour.  Events with a negative preference stay as they are.
    """
    pairs = [(shapes[:, 3:4], colours[:, 3:4]), (shapes[:, 4:5], colours[:, 4:5])]
    for pair_shape, pair_colour in pairs:
        taken = (shape == pair_shape) & (colour == pair_colour) & (preference >= 0)
        colour.copy_(torch.where(taken, colours[:, 5:6], colour))
    place = preference.argsort(-1, descending=True).argsort(-1)
    end = times.cumsum(1)
    for index, (pair_shape, pair_colour) in enumerate(pairs):
        begin = end[:, index : index + 1] - times[:, index : index + 1]
        chosen = (place >= begin) & (place < end[:, index : index + 1]) & (preference >= 0)
        shape.copy_(torch.where(chosen, pair_shape, shape))
        colour.copy_(torch.where(chosen, pair_colour, colour))


def _resolve(
    start: torch.Tensor, life: torch.Tensor, cell: torch.Tensor, num_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (visible, occupant) of :class:`Events`: in every cell the event that started last wins."""
    b, n = start.shape
    device = start.device
    age = torch.arange(MAX_LIFE, device=device)
    frame = start[..., None] + age
    active = (age < life[..., None]) & (frame < num_frames)
    # Start frames are distinct, so start + 1 names an event within its video, and 0 is left for "nobody".
    name = (start + 1)[..., None] * active
    place = (frame.clamp(max=num_frames - 1) * TOKENS_PER_FRAME + cell).view(b, -1)
    winner = torch.zeros(b, num_frames * TOKENS_PER_FRAME, dtype=torch.long, device=device)
    winner.scatter_reduce_(1, place, name.reshape(b, -1), "amax")
    visible = active & (winner.gather(1, place).view(b, n, MAX_LIFE) == name)
    event_named = torch.full((b, num_frames + 1), -1, dtype=torch.long, device=device)
    event_named.scatter_(1, start + 1, torch.arange(n, device=device).expand(b, n))
    return visible, event_named.gather(1, winner).view(b, num_frames, TOKENS_PER_FRAME)
