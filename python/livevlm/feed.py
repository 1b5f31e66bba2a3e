# SPDX-License-Identifier: Apache-2.0
"""Feed: a source that is read into a stream in the background, while the caller asks questions."""

from __future__ import annotations

import os
import threading
import time as clock
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from typing_extensions import Self

from livevlm.clips import Clip, Clips
from livevlm.errors import StateError
from livevlm.ingest import MOST_AHEAD
from livevlm.staging import Staged, Staging, clip_of
from livevlm.types import Drop
from livevlm.video import VideoReader, open_video

if TYPE_CHECKING:
    from livevlm.stream import Stream

LIVE_DELAY = 0.5  # seconds; of live sources, where nothing else is said


@dataclass(frozen=True)
class FeedStats:
    """Where a feed stands.

    Attributes:
        num_frames: frames read into the stream, in `num_clips` clips.
        num_dropped: frames left out because reading was slower than the source.
        num_waiting: frames that were taken from the source and not read; lost, once the feed is closed.
        num_damaged: frames that a video reader could not decode.
        delay, longest_delay: seconds from the arrival of a clip's first frame until all of it was in memory: of the
            newest clip, and the longest.
        ended: nothing more will be read.
    """

    num_frames: int
    num_clips: int
    num_dropped: int
    num_waiting: int
    num_damaged: int
    delay: float
    longest_delay: float
    ended: bool


class _Given(NamedTuple):
    """A clip that was given to the device."""

    done: torch.cuda.Event | None
    arrival: float


class Feed:
    """Made by `Stream.watching`, which says what the arguments mean. A context manager: leaving it stops the feed."""

    def __init__(
        self,
        stream: Stream,
        source: str | os.PathLike[str] | Iterable[tuple[float, Any]],
        *,
        fps: float | None,
        clip_frames: int | None,
        max_delay: float | None,
        drop: Drop | None,
        queue_frames: int | None,
        start: float,
    ) -> None:
        self._stream, self._start = stream, start
        self._owned = open_video(source, fps=fps) if isinstance(source, str | os.PathLike) else None
        reader: Any = self._owned or source
        self._reader = reader if isinstance(reader, VideoReader) else None
        is_live = self._reader is not None and self._reader.is_live
        adapter = stream.cache.adapter
        self._device = adapter.device
        self._staging = Staging(stream.processor, adapter.image_size, adapter.device, stream.frame_size)
        self._clips: Clips[Staged] = Clips(
            reader,
            self._staging,
            clip_frames=clip_frames or stream.config.clip_frames,
            max_delay=LIVE_DELAY if max_delay is None and is_live else max_delay,
            depth=queue_frames,
            drop=drop or ("oldest" if is_live else "never"),
        )
        self._num_frames = self._num_clips = 0
        self._delay = self._longest_delay = 0.0
        self._given: deque[_Given] = deque()
        self._error: BaseException | None = None
        self._closing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="livevlm-feed", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the thread that reads
    def _run(self) -> None:
        try:
            for clip in self._clips:
                with self._stream.gate.reading():
                    if self._closing:
                        break
                    self._read(clip)
                self._settle(MOST_AHEAD)
            self._settle(0)
        except BaseException as error:
            self._error = error
        finally:
            self._clips.stop()
            self._ended.set()

    def _read(self, clip: Clip[Staged]) -> None:
        times = [self._start + time for time in clip.times]
        self._stream.read_staged(clip_of(clip.frames), times, self._clips.num_dropped)
        self._stream.frame_size = self._staging.size
        self._num_frames += len(times)
        self._num_clips += 1
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))
        self._given.append(_Given(done, clip.arrival))

    def _settle(self, most: int) -> None:
        """Waits until at most so many clips are under way on the GPU, and notes how long those before took."""
        while len(self._given) > most or (self._given and self._given[0].done is None):
            given = self._given.popleft()
            if given.done is not None:
                given.done.synchronize()
            self._delay = clock.monotonic() - given.arrival
            self._longest_delay = max(self._longest_delay, self._delay)

    # ---------------------------------------------------------------- the caller
    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the source has ended and its frames are read; False if that takes more than `timeout` seconds.

        Raises:
            StateError: this thread holds an unfinished answer, for which the feed waits in turn.
            VideoError, FrameError ...: what ended the source or the reading; all frames before that are in memory.
        """
        if self._stream.gate.asked_here():
            raise StateError("an answer is being generated; finish or close it before waiting for the feed")
        if not self._ended.wait(timeout):
            return False
        self._raise()
        return True

    def stop(self) -> None:
        """Takes no more frames from the source; those that wait are still read: `wait` for that."""
        self._clips.stop()

    def close(self) -> None:
        """Stops reading after the present clip. Frames that still wait are left out, see `FeedStats.num_waiting`."""
        self._closing = True
        self._clips.stop()
        if not self._stream.gate.asked_here():  # else it waits for this thread's answer, and ends with it
            self._thread.join()
        if self._clips.close() and self._owned is not None:
            self._owned.close()  # not while another thread is inside of it

    def stats(self) -> FeedStats:
        return FeedStats(
            num_frames=self._num_frames,
            num_clips=self._num_clips,
            num_dropped=self._clips.num_dropped,
            num_waiting=self._clips.num_waiting,
            num_damaged=self._reader.num_damaged if self._reader else 0,
            delay=self._delay,
            longest_delay=self._longest_delay,
            ended=self._ended.is_set(),
        )

    @property
    def ended(self) -> bool:
        """Nothing more will be read: the source has ended, an error has stopped it, or it was closed."""
        return self._ended.is_set()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self._raise()
