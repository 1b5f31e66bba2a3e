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

    def texture(self, video: int) -> torch.Tensor:
        """Return float32 [S, 3, 112, 112]: the scenes of one video."""
        size = (FRAME_SIZE, FRAME_SIZE)
        smooth = F.interpolate(self.coarse[video], size=size, mode="bilinear", align_corners=True)
        return smooth + F.interpolate(self.grain[video], size=size, mode="nearest")


def _draw_scenes(b: int, f: int, rng: torch.Generator) -> _Scenes:
    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=rng)

    s = f // 12 + 2
    length = 12 + (uniform(b, s) * 29).long()
    end = length.cumsum(1) - (uniform(b, 1) * 12).long()
    of_frame = (torch.arange(f)[None, :, None] >= end[:, None, :]).sum(-1).clamp(max=s - 1)
    base = 0.28 + 0.34 * uniform(b * s, 1, 1, 1) + 0.10 * (uniform(b * s, 3, 1, 1) - 0.5)
    coarse = base + 0.24 * (uniform(b * s, 1, 5, 5) - 0.5) + 0.12 * (uniform(b * s, 3, 5, 5) - 0.5)
    grain = (uniform(b * s, 1, FRAME_SIZE // 2, FRAME_SIZE // 2) - 0.5) * 0.16
    phase, rate = uniform(b, 1) * 6.283, 0.05 + 0.25 * uniform(b, 1)
    gain = 1 + 0.10 * torch.sin(phase + rate * torch.arange(f))
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


def render(events: Events, rng: torch.Generator, noise_rng: torch.Generator) -> list[torch.Tensor]:
    """Draw a batch of videos: one uint8 tensor [F, 3, 112, 112] (RGB) for each, on ``noise_rng``'s device.

    ``rng`` draws the scenes on the CPU and ``noise_rng`` the pixel noise on the device the frames are made
    on, so the same seed gives the same objects and scenes on every device.
    """
    device = noise_rng.device
    b, f = events.occupant.shape[:2]
    scenes = _draw_scenes(b, f, rng)
    masks, palette = shape_masks().to(device), torch.tensor(RGB)
    videos = []
    for i in range(b):
        one, texture = events.video(i), scenes.texture(i).to(device)
        event = one.occupant.clamp(min=0)  # [F, 16]
        mask = torch.where(one.occupant >= 0, one.shape[event] * NUM_VARIANTS + one.variant[event], -1)
        mask, colour = mask.to(device), (palette[one.colour] + one.tint).clamp(0, 1)[event].to(device)
        of_frame, gain = scenes.of_frame[i].to(device), scenes.gain[i].to(device)[:, None, None, None]
        frames = torch.empty(f, 3, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8, device=device)
        for begin in range(0, f, FRAMES_AT_ONCE):
            now = slice(begin, begin + FRAMES_AT_ONCE)
            pixels = _paint(texture[of_frame[now]], colour[now], masks[mask[now]]) * gain[now]
            pixels += NOISE * torch.randn(pixels.shape, generator=noise_rng, device=device)
            frames[now] = pixels.clamp_(0, 1).mul_(255).round_()
        videos.append(frames)
    return videos
