# SPDX-License-Identifier: Apache-2.0
"""A video file from end to end: decoded, read, asked about."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from livevlm.benchmark.asking import questions
from livevlm.benchmark.live import CLIP, HEIGHT, WIDTH, Live
from livevlm.benchmark.report import Row, row
from livevlm.benchmark.timing import Limit, milliseconds
from livevlm.video import import_cv2, open_video

if TYPE_CHECKING:
    from livevlm.benchmark.parts import Plan
    from livevlm.benchmark.subject import Subject

MOST_FRAMES = 2048
FPS = 24.0


def write_video(path: Path, num_frames: int) -> None:
    """A smooth picture that moves, 360p, MPEG-4."""
    cv2 = import_cv2()
    coarse = torch.rand(1, 3, HEIGHT // 20, WIDTH // 20, generator=torch.Generator().manual_seed(0))
    picture = (F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic").clamp(0, 1) * 255).byte()[0]
    picture = picture.permute(1, 2, 0).contiguous()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (WIDTH, HEIGHT))
    try:
        for i in range(num_frames):
            writer.write(picture.roll((i, 3 * i), (0, 1)).numpy())
    finally:
        writer.release()


def file(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """A file of some frames: decoding alone, reading it all, and a question at its end."""
    count, device = min(plan.frames, MOST_FRAMES), subject.device
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, count)
        alone = milliseconds(partial(_decode, path), device) / count
        yield row("file", "decoder", "decode ms/frame", [alone], history=count)
        one = Live(subject, **{"clip_frames": CLIP, **dict(plan.settings)})
        cache = one.stream.cache
        one.watch(min(count, cache.budget // cache.adapter.tokens_per_frame + CLIP), CLIP)
        before = one.num_frames
        taken = milliseconds(partial(one.watch_file, path, CLIP), device) / count
        note = f"{one.num_frames - before} of {count} frames, decoding included"
        yield row("file", "livevlm", "encode ms/frame", [taken], history=count, frames=CLIP, note=note)
        yield from questions("file", "livevlm", one.ask, count, plan.repeats, limit)


def _decode(path: Path) -> None:
    with open_video(path, fps=None) as reader:
        for _ in reader:
            pass
