# SPDX-License-Identifier: Apache-2.0
"""Clips: a source's frames, taken and prepared ahead by a thread, and handed out a clip at a time."""

from __future__ import annotations

import threading
import time as clock
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from typing_extensions import Self

from livevlm.types import Drop

Frame = TypeVar("Frame")
JOIN_SECONDS = 5.0  # a camera that hangs in a driver cannot be waited for


class _Waiting(NamedTuple):
    time: float
    frame: Any
    arrival: float


@dataclass(frozen=True)
class Clip(Generic[Frame]):
    """Frames that are to be read together.

    Attributes:
        times: seconds of each in the source.
        arrival: when the first of them came, by `time.monotonic`.
    """

    frames: list[Frame]
    times: list[float]
    arrival: float


class Clips(Generic[Frame]):
    """Iterate over it, from one thread.

    Args:
        source: gives (seconds, frame), with times that do not decrease. It is used by the other thread alone.
        prepare: done to every frame by that thread.
        clip_frames: most frames in a clip.
        max_delay: a clip is closed when its first frame has waited for so many seconds, full or not; None: only full
            ones, and the last. Whatever has come meanwhile is in it, so that reading catches up in larger clips.
        depth: most frames that wait. Then, by `drop`, the source waits ("never"), or the "oldest" frame that waits or
            the "newest" that came is left out, and counted.
        cuts: no clip has frames on both sides of one of these times; a frame at such a time is before it.

    Iterating raises what the source or `prepare` raised, after all frames before that have been handed out.
    """

    def __init__(
        self,
        source: Iterable[tuple[float, Any]],
        prepare: Callable[[Any], Frame],
        *,
        clip_frames: int,
        max_delay: float | None = None,
        depth: int | None = None,
        drop: Drop = "never",
        cuts: Sequence[float] = (),
    ) -> None:
        self.clip_frames, self.max_delay, self.drop = clip_frames, max_delay, drop
        self.depth = max(depth or 2 * clip_frames, clip_frames)
        self.cuts = sorted(cuts)
        self.num_dropped = 0
        self._source, self._prepare = source, prepare
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._take, name="livevlm-source", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the thread that takes frames
    def _take(self) -> None:
        try:
            for time, frame in self._source:
                if not self._has_room():
                    if self._stopped:
                        break
                    continue  # dropped
                one = _Waiting(float(time), self._prepare(frame), clock.monotonic())
                with self._changed:
                    if self._stopped:
                        break
                    self._waiting.append(one)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whether a frame that has come is kept, after making room for it."""
        with self._changed:
            if self.drop == "never":
                self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self.depth)
            elif len(self._waiting) >= self.depth:
                self.num_dropped += 1
                if self.drop == "newest":
                    return False
                self._waiting.popleft()
            return not self._stopped

    # ---------------------------------------------------------------- the thread that reads clips
    def __iter__(self) -> Iterator[Clip[Frame]]:
        while True:
            clip = self.next()
            if clip is None:
                return
            yield clip

    def next(self) -> Clip[Frame] | None:
        """The next clip, when it is closed; None at the end."""
        with self._changed:
            while True:
                count = self._num_ready()
                if count:
                    taken = [self._waiting.popleft() for _ in range(count)]
                    self._changed.notify_all()
                    return Clip([w.frame for w in taken], [w.time for w in taken], taken[0].arrival)
                if (self._ended or self._stopped) and not self._waiting:
                    break
                self._changed.wait(self._patience())
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def _num_ready(self) -> int:
        """Frames of the next clip if it is closed, else 0."""
        segment, count = None, 0
        for one in self._waiting:
            here = bisect_left(self.cuts, one.time)
            if count == self.clip_frames or here != (here if segment is None else segment):
                return count
            segment, count = here, count + 1
        patience = self._patience()
        closed = self._ended or self._stopped or count == self.clip_frames or (patience is not None and patience <= 0)
        return count if closed else 0

    def _patience(self) -> float | None:
        """Seconds for which a clip that is not full is still waited with."""
        if self.max_delay is None or not self._waiting:
            return None
        return max(0.0, self._waiting[0].arrival + self.max_delay - clock.monotonic())

    # ---------------------------------------------------------------- the end
    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stop(self) -> None:
        """No more frames are taken; those that wait can still be had."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> bool:
        """Stops and waits for the thread; False if it hangs in the source, which must not be closed then."""
        self.stop()
        self._thread.join(JOIN_SECONDS)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
