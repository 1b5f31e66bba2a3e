# SPDX-License-Identifier: Apache-2.0
"""Frames of whatever a benchmark ships: video files, `.npy` stacks, folders of pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from livevlm.benchmarks.schema import Video
from livevlm.errors import VideoError
from livevlm.video import open_video

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SLACK = 2.0  # seconds by which a video may be longer or shorter than its annotation says


@dataclass(frozen=True)
class Source:
    """Seconds and frames of a video at the rate asked for; `num_frames` if it is known, `duration` too."""

    frames: Iterator[tuple[float, Any]]
    num_frames: int | None
    duration: float | None


@contextmanager
def opened(path: Path, video: Video, *, fps: float, stored_fps: float) -> Iterator[Source]:
    """A video, looked at `fps` times a second.

    Args:
        stored_fps: frames a second that stacks and folders of pictures were taken at; files know theirs.

    Raises:
        VideoError: it cannot be read.
    """
    if path.suffix == ".npy":
        yield _stored(*_stack(path), path, video, fps, stored_fps)
    elif path.is_dir():
        yield _stored(*_folder(path), path, video, fps, video.stored_fps or stored_fps)
    else:
        with open_video(path, fps=fps) as reader:
            _check_length(path, video, reader.duration)
            yield Source(reader, reader.num_frames_estimate, reader.duration)


def _stored(count: int, frame: Callable[[int], Any], path: Path, video: Video, fps: float, stored_fps: float) -> Source:
    seconds = count / stored_fps
    _check_length(path, video, seconds)
    taken = [i for i in range(count) if _is_due(i, fps, stored_fps)]
    return Source(((i / stored_fps, frame(i)) for i in taken), len(taken), seconds)


def _check_length(path: Path, video: Video, seconds: float | None) -> None:
    """Raises VideoError if this is a clip alone: its questions would be asked too late."""
    if video.clip is None or video.duration is None or seconds is None:
        return
    clip = video.clip[1] - video.clip[0]
    if abs(seconds - clip) <= SLACK < abs(seconds - video.duration):
        raise VideoError(
            f"{path}: {seconds:g} s long, as the clip from {video.clip[0]:g} to {video.clip[1]:g} s is, but its "
            f"questions' times count from the start of the whole, of {video.duration:g} s"
        )


def _is_due(index: int, fps: float, stored_fps: float) -> bool:
    """Whether this frame is the first at or after one of the moments 0, 1 / fps, 2 / fps ..."""
    step, small = fps / stored_fps, 1e-6
    return index == 0 or math.floor(index * step + small) > math.floor((index - 1) * step + small)


def _stack(path: Path) -> tuple[int, Callable[[int], Any]]:
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VideoError(f"{path}: cannot be read as a stack of frames: {error}") from None
    if frames.ndim != 4 or not len(frames) or frames.dtype != np.uint8:
        raise VideoError(
            f"{path}: holds {frames.dtype} of shape {frames.shape}; allowed: uint8 [frames, height, width, 3]"
        )
    return len(frames), lambda i: np.array(frames[i])


def _folder(path: Path) -> tuple[int, Callable[[int], Any]]:
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in PICTURES), key=_natural)
    if not files:
        raise VideoError(f"{path}: no picture is in this folder ({', '.join(PICTURES)})")

    def frame(index: int) -> Any:
        import cv2

        try:
            picture = cv2.imdecode(np.fromfile(files[index], dtype=np.uint8), cv2.IMREAD_COLOR)
        except (OSError, cv2.error) as error:  # the latter of an empty file
            raise VideoError(f"{files[index]}: cannot be read as a picture: {error}") from error
        if picture is None:
            raise VideoError(f"{files[index]}: cannot be read as a picture")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    return len(files), frame


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame_10 after frame_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
