# SPDX-License-Identifier: Apache-2.0
"""Frames taken ahead by a thread: their order, which are dropped, when a clip is closed, and errors of the source."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from livevlm.clips import Clip, Clips
from livevlm.errors import VideoError

PATIENCE = 10.0  # seconds after which a test is given up


class Source:
    """Frames that come when a test says so; the frame is its number, its time is the number too."""

    def __init__(self, total: int | None = None, error: Exception | None = None) -> None:
        self.total, self.error = total, error
        self.allowed = threading.Semaphore(0)
        self.num_given = 0

    def __iter__(self) -> Iterator[tuple[float, int]]:
        for index in count() if self.total is None else range(self.total):
            assert self.allowed.acquire(timeout=PATIENCE)
            self.num_given += 1
            yield float(index), index
        if self.error:
            raise self.error

    def give(self, number: int) -> None:
        self.allowed.release(number)


def eventually(condition: object) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.001)


def numbered(total: int) -> Iterator[tuple[float, int]]:
    return ((float(i), i) for i in range(total))


def frames(clips: Clips[int]) -> list[list[int]]:
    return [clip.frames for clip in clips]


def test_all_frames_in_order_in_full_clips() -> None:
    with Clips(numbered(20), lambda x: 10 * x, clip_frames=8, depth=9) as clips:
        got = list(clips)
    assert [clip.frames for clip in got] == [[10 * i for i in range(a, b)] for a, b in ((0, 8), (8, 16), (16, 20))]
    assert got[1].times == [float(i) for i in range(8, 16)]
    assert clips.num_dropped == clips.num_waiting == 0


def test_a_full_queue_holds_the_source_back() -> None:
    source = Source()
    with Clips(source, int, clip_frames=2, depth=4) as clips:
        source.give(100)
        eventually(lambda: clips.num_waiting == 4)
        time.sleep(0.02)
        assert source.num_given == 5  # one that waits for room
        assert clips.next().frames == [0, 1]
        eventually(lambda: source.num_given == 7)
    assert not clips._thread.is_alive()


@pytest.mark.parametrize(("drop", "left"), [("oldest", [[5, 6], [7, 8]]), ("newest", [[0, 1], [2, 3]])])
def test_what_a_full_queue_drops_is_counted(drop: str, left: list[list[int]]) -> None:
    source = Source(9)
    prepared: list[int] = []

    def prepare(frame: int) -> int:
        prepared.append(frame)
        return frame

    with Clips(source, prepare, clip_frames=2, depth=4, drop=drop) as clips:
        source.give(9)
        eventually(lambda: clips._ended)
        assert frames(clips) == left
    assert clips.num_dropped == 5
    assert drop == "oldest" or prepared == [0, 1, 2, 3]  # no work for what is thrown away


def test_a_clip_closes_after_its_delay() -> None:
    source = Source()
    with Clips(source, int, clip_frames=8, max_delay=0.05) as clips:
        source.give(3)
        start = time.monotonic()
        clip = clips.next()
        assert clip.frames == [0, 1, 2] or time.monotonic() - start > 1  # a machine too busy to hand out three in time
        assert time.monotonic() - clip.arrival > 0.04
        source.give(8)
        eventually(lambda: clips.num_waiting == 8)
        assert len(clips.next().frames) == 8  # full: not waited with
        source.give(1)
        clips.stop()
        source.give(1)
    with Clips(numbered(3), int, clip_frames=8, max_delay=0) as clips:
        assert [frame for clip in clips for frame in clip.frames] == [0, 1, 2]


def test_no_clip_spans_a_cut() -> None:
    with Clips(numbered(10), int, clip_frames=4, cuts=[6.5, 2.0]) as clips:
        assert frames(clips) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("where", ["source", "prepare"])
def test_an_error_comes_after_the_frames_before_it(where: str) -> None:
    def prepare(frame: int) -> int:
        if where == "prepare" and frame == 3:
            raise VideoError("broke off")
        return frame

    source = Source(3, VideoError("broke off")) if where == "source" else Source()
    source.give(10)
    got: list[Clip[int]] = []
    with Clips(source, prepare, clip_frames=2) as clips, pytest.raises(VideoError, match="broke off"):
        for clip in clips:
            got.append(clip)
    assert [clip.frames for clip in got] == [[0, 1], [2]]
    assert clips.next() is None  # an error is told once


def test_stopping_keeps_what_has_come() -> None:
    source = Source()
    clips = Clips(source, int, clip_frames=4)
    source.give(3)
    eventually(lambda: clips.num_waiting == 3)
    clips.stop()
    source.give(1)
    assert frames(clips) == [[0, 1, 2]]
    assert clips.close()
