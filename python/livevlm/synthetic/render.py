# SPDX-License-Identifier: Apache-2.0
"""Turn events into pixels.

The background is a smooth texture with static grain that stays for a scene of 12 to 40 frames; the whole
picture drifts in brightness, and every pixel of every frame gets fresh noise, as a camera's would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from livevlm.synthetic.events import MAX_SHIFT, NUM_VARIANTS, Events
from livevlm.synthetic.vocabulary import CELL_SIZE, FRAME_SIZE, GRID, SHAPES

RGB: tuple[tuple[float, float, float], ...] = (
    (0.90, 0.10, 0.10),
    (0.10, 0.75, 0.15),
    (0.15, 0.25, 0.95),
    (0.95, 0.90, 0.10),
    (0.65, 0.10, 0.85),
    (0.10, 0.85, 0.90),
    (1.00, 0.55, 0.05),
    (0.98, 0.98, 0.98),
)
"""The RGB value of each of ``COLOURS``, 0 to 1."""

RADII = (9.4, 10.6, 11.8)
"""The sizes an object is drawn with, in pixels."""
NOISE = 0.035
"""Standard deviation of the pixel noise, where white is 1."""
SUPERSAMPLING = 4
"""Samples of a silhouette along each axis of a pixel."""
FRAMES_AT_ONCE = 256
"""Frames drawn in one step: bounds the memory taken by float pixels."""

Silhouette = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    angle = torch.atan2(x, -y)
    tip = (angle % (2 * math.pi / 5) - math.pi / 5).abs() / (math.pi / 5)  # 1 at the tips, 0 between them
    return (x * x + y * y).sqrt() < 0.42 + 0.66 * tip**1.5


def _cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x.abs() < 0.30) & (y.abs() < 1)) | ((y.abs() < 0.30) & (x.abs() < 1))


def _ring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    radius = (x * x + y * y).sqrt()
    return (radius < 1.05) & (radius > 0.62)


# Inside test of each shape; x grows to the right and y downwards, in units of the object's radius.
SILHOUETTES: dict[str, Silhouette] = {
    "circle": lambda x, y: (x * x + y * y).sqrt() < 0.95,
    "square": lambda x, y: (x.abs() < 0.82) & (y.abs() < 0.82),
    "triangle": lambda x, y: (y < 0.75) & (y > -0.95 + 2 * x.abs() * 0.95),
    "star": _star,
    "cross": _cross,
    "diamond": lambda x, y: x.abs() / 0.72 + y.abs() / 1.08 < 1,
    "ring": _ring,
    "bar": lambda x, y: (x.abs() < 1.05) & (y.abs() < 0.34),
}


@lru_cache(maxsize=1)
def shape_masks() -> torch.Tensor:
    """Return float32 [8 * NUM_VARIANTS + 1, 28, 28]: antialiased coverage, 0 to 1; the last mask is empty.

    The index is ``shape * NUM_VARIANTS + variant``.  The tensor is shared: do not write to it.
    """
    axis = (torch.arange(CELL_SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shifts = range(-MAX_SHIFT, MAX_SHIFT + 1)
    masks = [
        SILHOUETTES[name]((x - CELL_SIZE / 2 - dx) / radius, (y - CELL_SIZE / 2 - dy) / radius)
        for name in SHAPES
        for radius in RADII
        for dy in shifts
        for dx in shifts
    ]
    fine = torch.stack([*masks, torch.zeros_like(masks[0])]).float()
    return F.avg_pool2d(fine[:, None], SUPERSAMPLING)[:, 0]


@dataclass(frozen=True, eq=False)
class _Scenes:
    """The backgrounds of a batch: of B videos with F frames and up to S scenes each."""

    of_frame: torch.Tensor
    """int64 [B, F]: the scene each frame belongs to."""
    coarse: torch.Tensor
    """float32 [B, S, 3, 5, 5]: the smooth texture, before it is scaled up."""
    grain: torch.Tensor
    """float32 [B, S, 1, 56, 56]: the static grain, before it is scaled up."""
    gain: torch.Tensor
    """float32 [B, F]: brightness of each frame."""

    def texture(self) -> torch.Tensor:
        """Return float32 [B, S, 3, 112, 112]: the scenes."""
        size = (FRAME_SIZE, FRAME_SIZE)
        smooth = F.interpolate(self.coarse.flatten(0, 1), size=size, mode="bilinear", align_corners=True)
        grain = F.interpolate(self.grain.flatten(0, 1), size=size, mode="nearest")
        return (smooth + grain).view(*self.coarse.shape[:3], *size)

    def videos(self, which: slice) -> _Scenes:
        """Return the scenes of some of the videos."""
        return _Scenes(**{name: value[which] for name, value in vars(self).items()})


def _draw_scenes(b: int, f: int, rng: torch.Generator) -> _Scenes:
    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=rng, device=rng.device)

    s = f // 12 + 2
    frame = torch.arange(f, device=rng.device)
    length = 12 + (uniform(b, s) * 29).long()
    end = length.cumsum(1) - (uniform(b, 1) * 12).long()
    of_frame = (frame[None, :, None] >= end[:, None, :]).sum(-1).clamp(max=s - 1)
    base = 0.28 + 0.34 * uniform(b * s, 1, 1, 1) + 0.10 * (uniform(b * s, 3, 1, 1) - 0.5)
    coarse = base + 0.24 * (uniform(b * s, 1, 5, 5) - 0.5) + 0.12 * (uniform(b * s, 3, 5, 5) - 0.5)
    grain = (uniform(b * s, 1, FRAME_SIZE // 2, FRAME_SIZE // 2) - 0.5) * 0.16
    phase, rate = uniform(b, 1) * 6.283, 0.05 + 0.25 * uniform(b, 1)
    gain = 1 + 0.10 * torch.sin(phase + rate * frame)
    return _Scenes(of_frame, coarse.view(b, s, 3, 5, 5), grain.view(b, s, 1, *grain.shape[2:]), gain)


def _paint(background: torch.Tensor, colour: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Lay the objects over the background.

    ``background`` is [F, 3, 112, 112], ``colour`` [F, 16, 3] and ``cover`` [F, 16, 28, 28]; all float32.
    """
    cells = background.view(-1, 3, GRID, CELL_SIZE, GRID, CELL_SIZE).transpose(3, 4)
    paint = colour.view(-1, GRID, GRID, 3).permute(0, 3, 1, 2)[..., None, None]
    alpha = cover.view(-1, 1, GRID, GRID, CELL_SIZE, CELL_SIZE)
    painted = torch.lerp(cells, paint.expand_as(cells), alpha.expand_as(cells))
    return painted.transpose(3, 4).reshape(background.shape)


@dataclass(frozen=True, eq=False)
class _Picture:
    """All that is needed to draw the M frames of one or more videos, one after the other, on one device."""

    texture: torch.Tensor
    """float32 [scenes, 3, 112, 112]."""
    of_frame: torch.Tensor
    """int64 [M]: index into ``texture``."""
    gain: torch.Tensor
    """float32 [M]."""
    mask: torch.Tensor
    """int64 [M, 16]: index into :func:`shape_masks`."""
    colour: torch.Tensor
    """float32 [M, 16, 3]."""
    masks: torch.Tensor
    """float32 [masks, 28, 28]: :func:`shape_masks`."""

    def frames(self, now: slice, noise_rng: torch.Generator) -> torch.Tensor:
        """Return uint8 [frames, 3, 112, 112]: some of the frames, with fresh noise."""
        background, gain = self.texture[self.of_frame[now]], self.gain[now, None, None, None]
        pixels = _paint(background, self.colour[now], self.masks[self.mask[now]]) * gain
        pixels += NOISE * torch.randn(pixels.shape, generator=noise_rng, device=pixels.device)
        return pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _picture(events: Events, scenes: _Scenes, device: torch.device) -> _Picture:
    b, f = events.occupant.shape[:2]
    texture = scenes.texture()
    occupant = events.occupant.flatten(1)  # [B, F * 16]
    event = occupant.clamp(min=0)
    kind = events.shape * NUM_VARIANTS + events.variant
    mask = torch.where(occupant >= 0, kind.gather(1, event), len(SHAPES) * NUM_VARIANTS)
    palette = _palette(events.colour.device)
    colour = (palette[events.colour] + events.tint).clamp(0, 1).gather(1, event[..., None].expand(-1, -1, 3))
    of_frame = scenes.of_frame + torch.arange(b, device=mask.device)[:, None] * texture.shape[1]
    return _Picture(
        texture.flatten(0, 1).to(device),
        of_frame.flatten().to(device),
        scenes.gain.flatten().to(device),
        mask.view(b * f, -1).to(device),
        colour.view(b * f, -1, 3).to(device),
        _masks_on(device),
    )


@lru_cache(maxsize=8)
def _palette(device: torch.device) -> torch.Tensor:
    return torch.tensor(RGB, device=device)


@lru_cache(maxsize=8)
def _masks_on(device: torch.device) -> torch.Tensor:
    return shape_masks().to(device)


def render(events: Events, rng: torch.Generator, noise_rng: torch.Generator) -> list[torch.Tensor]:
    """Draw a batch of videos: one uint8 tensor [F, 3, 112, 112] (RGB) for each, on ``noise_rng``'s device.

    ``rng`` draws the scenes on the CPU and ``noise_rng`` the pixel noise on the device the frames are made
    on, so the same seed gives the same objects and scenes on every device.
    """
    b, f = events.occupant.shape[:2]
    scenes = _draw_scenes(b, f, rng)
    videos = []
    for i in range(b):
        one = slice(i, i + 1)
        picture = _picture(events.videos(one), scenes.videos(one), noise_rng.device)
        frames = torch.empty(f, 3, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8, device=noise_rng.device)
        for begin in range(0, f, FRAMES_AT_ONCE):
            now = slice(begin, begin + FRAMES_AT_ONCE)
            frames[now] = picture.frames(now, noise_rng)
        videos.append(frames)
    return videos


def render_batch(events: Events, rng: torch.Generator) -> torch.Tensor:
    """Draw a batch of videos at once, uint8 [B, F, 3, 112, 112] (RGB); scenes and noise on the device of ``rng``.

    Like :func:`render`, with other random numbers, in a few large steps and without waiting for the device; float
    pixels of the whole batch are in memory at a time.
    """
    b, f = events.occupant.shape[:2]
    picture = _picture(events, _draw_scenes(b, f, rng), rng.device)
    return picture.frames(slice(None), rng).view(b, f, 3, FRAME_SIZE, FRAME_SIZE)
