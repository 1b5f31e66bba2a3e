# SPDX-License-Identifier: Apache-2.0
"""Read frames from a video file, a camera or a network address, with OpenCV."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from livevlm.errors import ConfigError, VideoError
from livevlm.video_checks import check_file, explain_unreadable, has_exact_frame_count

__all__ = ["VideoReader", "open_video"]

ROUNDING = 1e-3
"""A frame may be this early, in seconds: some containers round timestamps to the millisecond."""
MAX_DAMAGED = 32
"""So many frames in a row that cannot be decoded are skipped; after more the video counts as ended."""
LIVE_PATIENCE = 1.0
"""Seconds of failing after which a live source counts as ended: a lost connection fails slowly."""
MAX_NATIVE_FPS = 1000.0
"""A file that claims a higher frame rate does not know its frame rate."""
MAX_OVERRUN = 60.0
"""A timestamp this far beyond the header's duration, in seconds, is taken for damaged."""
END_SLACK = (0.02, 1.0)
"""What a file may lack at its end: this share of its duration or these seconds, whichever is more."""
END_SLACK_ESTIMATED = (0.05, 3.0)
"""The same where the header's duration also covers a sound track that may go on longer."""


def open_video(source: str | os.PathLike[str], *, fps: float | None = 1.0) -> VideoReader:
    """Open a video and return a reader of frames sampled ``fps`` times a second.

    source: the path of a video file; or, for a live source, the number of a camera (``"0"``), its device
        (``"/dev/video0"``) or an address with a scheme (``"rtsp://..."``, ``"http://..."``, ``"udp://..."``).
    fps: how many frames a second of video to take, at most; None takes every frame.

    Raises ConfigError if ``fps`` is not a positive number, and VideoError if the source does not exist, is
    not a video, or has no frames.
    """
    if fps is not None and not (_is_number(fps) and math.isfinite(fps) and fps > 0):
        raise ConfigError(f"fps={fps!r}: must be a number above 0, or None for every frame")
    return VideoReader(os.fspath(source), None if fps is None else float(fps))


class VideoReader:
    """An iterator of (time in seconds, frame), and a context manager; made by :func:`open_video`.

    A frame is a uint8 tensor [3, H, W], RGB, channels last in memory, turned upright if the file says how it was
    filmed.  Each frame comes at most once: nothing is repeated where a file with a variable frame rate has none for a
    while.
    The first frame is at the time the file gives it, mostly 0, and the others follow from there.

    A live source is timed by its own timestamps where it has any, otherwise by the clock, and simply ends
    when it stops sending.  Read it as fast as it plays, or what is read falls behind.

    A damaged frame is skipped and counted, and the next good one takes its place.  Iterating raises VideoError,
    after the good frames have been given, if a file ends early or a decoded frame cannot be retrieved.
    """

    path: str
    """The source as it was given."""
    is_live: bool
    """Whether it is a camera or an address."""
    fps: float | None
    """Frames a second that are taken, or None for all."""
    native_fps: float | None
    """Frames a second of the source, on average; None if it does not say."""
    size: tuple[int, int]
    """Width and height of a frame in pixels."""
    duration: float | None
    """Length in seconds according to the file's header; None for a live source or if it does not say."""
    num_frames_estimate: int | None
    """How many frames iterating is expected to give; None if the duration is not known."""
    num_damaged: int
    """How many frames have been skipped so far because they were damaged."""

    def __init__(self, path: str, fps: float | None) -> None:
        self.path, self.fps = path, fps
        self.is_live = _is_live(path)
        if not self.is_live:
            check_file(path)
        self._cv2 = cv2 = import_cv2()
        self._capture = self._open()

        def number(name: int) -> float:
            value = float(self._capture.get(name))
            return value if math.isfinite(value) and value > 0 else 0.0

        rate, count = number(cv2.CAP_PROP_FPS), 0.0 if self.is_live else number(cv2.CAP_PROP_FRAME_COUNT)
        self.native_fps = rate if 0 < rate <= MAX_NATIVE_FPS else None
        self.size = (int(number(cv2.CAP_PROP_FRAME_WIDTH)), int(number(cv2.CAP_PROP_FRAME_HEIGHT)))
        self.duration = count / self.native_fps if self.native_fps and count else None
        self.num_frames_estimate = None
        if self.duration is not None:
            wanted = math.ceil(self.duration * fps - ROUNDING) if fps else math.inf
            self.num_frames_estimate = int(max(1, min(count, wanted)))

        self.num_damaged = 0
        self._closed = False
        self._began = time.monotonic()
        self._origin = self._first = self._time = self._due = 0.0
        self._started = False
        self._pending = self._grab()  # a frame that was gone to, and not looked at yet
        if not self._pending:
            self.close()
            raise VideoError(f"{path}: no frame of it could be decoded")

    def __iter__(self) -> Iterator[tuple[float, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[float, torch.Tensor]:
        while not self._closed and (self._pending or self._grab()):
            self._pending = False
            if self._time < self._due - ROUNDING:
                continue
            if self.fps is not None:
                # Due times lie on one grid, so that a late frame does not delay those after it.
                step = math.floor((self._time - self._first + ROUNDING) * self.fps) + 1
                self._due = self._first + step / self.fps
            return self._time, self._retrieve()
        self._check_end()
        raise StopIteration

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the source; iterating gives nothing more.  Closing twice is fine."""
        self._closed = True
        self._capture.release()

    def _open(self) -> Any:
        cv2 = self._cv2
        if self.is_live and self.path.isdigit():
            capture = cv2.VideoCapture(int(self.path))
        elif self.is_live and "://" not in self.path:
            capture = cv2.VideoCapture(self.path)
        else:
            # An absolute path, so that no name is taken for an address ("12:30.mp4") or a pattern.
            target = self.path if self.is_live else os.path.abspath(self.path)
            capture = cv2.VideoCapture(target, cv2.CAP_FFMPEG)
        if not capture.isOpened():
            capture.release()
            if self.is_live:
                raise VideoError(f"{self.path}: cannot connect to this camera or address")
            raise VideoError(f"{self.path}: {explain_unreadable(Path(self.path))}")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        return capture

    def _grab(self) -> bool:
        """Go to the next frame and set its time, in seconds; return False if there is none."""
        deadline = time.monotonic() + LIVE_PATIENCE if self.is_live else math.inf
        failures = 0
        while not self._capture.grab():
            failures += 1
            if failures > MAX_DAMAGED or time.monotonic() > deadline:
                return False
        self.num_damaged += failures
        stamp = round(float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000, 6)  # 4200 of 600 ticks are 7 s
        if not self._started:
            self._started = True
            usable = math.isfinite(stamp) and stamp > 0
            self._origin = stamp if usable and self.is_live else 0.0  # may count from when the camera started
            self._first = self._time = self._due = stamp - self._origin if usable else 0.0
            return True
        stamp -= self._origin
        latest = math.inf if self.duration is None else self.duration + MAX_OVERRUN
        if self._time < stamp <= latest:
            self._time = stamp
        elif self.is_live:
            self._time = max(self._time, time.monotonic() - self._began)
        elif self.native_fps:
            self._time += 1 / self.native_fps
        return True

    def _retrieve(self) -> torch.Tensor:
        decoded, picture = self._capture.retrieve()
        if not decoded or picture is None:
            self.close()
            raise VideoError(f"{self.path}: the frame at {_clock(self._time)} could not be decoded")
        rgb = self._cv2.cvtColor(picture, self._cv2.COLOR_BGR2RGB)
        return torch.from_numpy(rgb).permute(2, 0, 1)  # pixel by pixel in memory: reordering 1080p takes 13 ms

    def _check_end(self) -> None:
        """Raise VideoError, once, if the last frame came much earlier than the header says it should."""
        if self._closed:
            return
        self.close()
        if self.duration is None:
            return
        share, seconds = END_SLACK if has_exact_frame_count(Path(self.path)) else END_SLACK_ESTIMATED
        end = self._time - self._first + (1 / self.native_fps if self.native_fps else 0.0)
        if end < self.duration - max(share * self.duration, seconds):
            raise VideoError(
                f"{self.path}: broke off at {_clock(end)} of {_clock(self.duration)}: the file is cut short or damaged"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_live(path: str) -> bool:
    is_address = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None
    return is_address or path.startswith("/dev/video") or (path.isascii() and path.isdigit())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes):02d}:{rest:04.1f}"


def import_cv2() -> Any:
    """Import OpenCV with its own messages off: a user gets one VideoError instead."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise VideoError(
            f"reading video needs OpenCV, which cannot be imported: pip install opencv-python-headless ({error})"
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it may have been imported before
    return cv2
