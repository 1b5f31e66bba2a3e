# SPDX-License-Identifier: Apache-2.0
"""`Stream.watching`: the same memory as pushing, questions while frames wait, drops, errors, and the end."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import livevlm
from livevlm import ConfigError, FrameError, StateError, Stream, VideoError
from livevlm.synthetic import SyntheticVideo, generate
from test_clips import PATIENCE, Source, eventually
from test_stream import bits

SAMPLE = Path(__file__).parents[1] / "examples" / "sample.mp4"
QUESTION = "what colour was the star ?"


@pytest.fixture(scope="module")
def tiny() -> livevlm.Checkpoint:
    return livevlm.load("tiny", device="cpu")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("livevlm.clips.JOIN_SECONDS", 0.5)  # for sources that hang


@pytest.fixture(scope="module")
def video() -> SyntheticVideo:
    return generate(40, seed=5)[0]


def timed(video: SyntheticVideo) -> Iterator[tuple[float, torch.Tensor]]:
    return ((0.5 * i, frame) for i, frame in enumerate(video.frames))


class Shown(Source):
    """The video's frames, as a test allows."""

    def __init__(self, video: SyntheticVideo, **options: object) -> None:
        super().__init__(len(video.frames), **options)  # type: ignore[arg-type]
        self.video = video

    def __iter__(self) -> Iterator[tuple[float, torch.Tensor]]:
        return ((when, self.video.frames[index]) for when, index in super().__iter__())


def test_the_same_memory_as_pushing(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    pushed, watched = Stream(*tiny), Stream(*tiny)
    for first in range(0, 40, 8):
        pushed.push(video.frames[first : first + 8], times=[0.5 * i for i in range(first, min(40, first + 8))])
    with watched.watching(timed(video), clip_frames=8) as feed:
        assert feed.wait(PATIENCE)
    assert all(torch.equal(a, b) for a, b in zip(bits(pushed), bits(watched), strict=True))
    assert pushed.ask(QUESTION) == watched.ask(QUESTION)
    stats = feed.stats()
    assert (stats.num_frames, stats.num_clips, stats.num_dropped, stats.num_waiting) == (40, 5, 0, 0)
    assert stats.ended and 0 < stats.delay <= stats.longest_delay
    with pytest.raises(FrameError, match="run backwards"), watched.watching(timed(video)) as feed:
        feed.wait(PATIENCE)
    with watched.watching(timed(video), start=20.0) as feed:
        feed.wait(PATIENCE)
    assert watched.stats().num_frames == 80 and watched.stats().seconds == 39.5


def test_a_file(tiny: livevlm.Checkpoint, tmp_path: Path) -> None:
    stream = Stream(*tiny)
    with stream.watching(SAMPLE, fps=2) as feed:
        feed.wait(2 * PATIENCE)
    assert stream.stats().num_frames == 128
    with pytest.raises(VideoError, match="no such file"):
        stream.watching(tmp_path / "none.mp4")
    assert not feed._thread.is_alive() and not feed._clips._thread.is_alive()


def test_a_question_does_not_wait_for_the_backlog(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, order = Stream(*tiny), []
    read = stream.read_staged

    def slowly(*args: object) -> None:
        read(*args)
        order.append("clip")
        time.sleep(0.03)

    monkeypatch.setattr(stream, "read_staged", slowly)
    with stream.watching(timed(video), clip_frames=2, queue_frames=40) as feed:
        eventually(lambda: order)
        answers = [stream.ask(QUESTION)]
        order.append("answer")
        pieces = stream.ask(QUESTION, stream=True)
        next(pieces)
        before = stream.stats().num_frames
        with pytest.raises(StateError, match="finish or close it before"):
            feed.wait()
        time.sleep(0.1)
        assert stream.stats().num_frames == before  # nothing is read while an answer is being given
        pieces.close()
        with pytest.raises(StateError, match="is being watched"):
            stream.push(video.frames[:1])
        with pytest.raises(StateError, match="is being watched"):
            stream.watching(timed(video))
        assert feed.wait(PATIENCE)
    assert order.index("answer") <= 4 and order.count("clip") == 20
    assert answers[0].ttft > 0


def test_a_live_source_faster_than_reading(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, source, allowed = Stream(*tiny), Shown(video), threading.Semaphore(0)
    read = stream.read_staged

    def when_allowed(*args: object) -> None:
        assert allowed.acquire(timeout=PATIENCE)
        read(*args)

    monkeypatch.setattr(stream, "read_staged", when_allowed)
    with stream.watching(source, clip_frames=4, max_delay=0, drop="oldest", queue_frames=6) as feed:
        source.give(40)
        eventually(lambda: source.num_given == 40 and feed._clips._ended)
        for _ in range(40):
            allowed.release()
        assert feed.wait(PATIENCE)
    stats = feed.stats()
    assert stats.num_frames + stats.num_dropped == 40 and stats.num_dropped >= 30
    assert stream.stats().num_dropped_frames == stats.num_dropped
    assert stream.stats().seconds == 39  # the newest are there


def test_a_source_that_breaks(tiny: livevlm.Checkpoint, video: SyntheticVideo, tmp_path: Path) -> None:
    stream, source = Stream(*tiny), Shown(video, error=VideoError("the cable is out"))
    source.give(40)
    with pytest.raises(VideoError, match="cable"), stream.watching(source, clip_frames=8):
        eventually(lambda: stream.stats().num_frames == 40)
    whole = Stream(*tiny)
    with whole.watching(timed(video), clip_frames=8) as feed:
        feed.wait(PATIENCE)
    assert stream.ask(QUESTION) == whole.ask(QUESTION)

    cut = tmp_path / "cut.mp4"
    shutil.copy(SAMPLE, cut)
    cut.write_bytes(SAMPLE.read_bytes()[:120_000])
    with pytest.raises(VideoError), Stream(*tiny).watching(cut) as feed:
        feed.wait(PATIENCE)


def test_a_failure_of_the_model_ends_the_feed_and_not_the_stream(
    tiny: livevlm.Checkpoint, video: SyntheticVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(*tiny)
    stream.push(video.frames[:8], times=[0.0] * 8)
    before, expected = bits(stream), stream.ask(QUESTION)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(stream.cache.adapter, "embed_frames", fail)
        with stream.watching(timed(video), clip_frames=4) as feed, pytest.raises(torch.OutOfMemoryError):
            feed.wait(PATIENCE)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stream), strict=True))
    assert stream.ask(QUESTION) == expected


def test_closing_early(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream, source = Stream(*tiny), Shown(video)
    with pytest.raises(KeyboardInterrupt), stream.watching(source, clip_frames=4, max_delay=0) as feed:
        source.give(6)
        eventually(lambda: stream.stats().num_frames)
        raise KeyboardInterrupt
    stats = feed.stats()
    assert stats.ended and stats.num_frames + stats.num_waiting <= 6
    assert not feed._thread.is_alive()
    stream.push(video.frames[:1])  # the stream is free again
    with stream.watching(Shown(video), start=100.0) as feed:
        assert not feed.ended and not feed.wait(0.01)
        source = feed._clips._source  # type: ignore[assignment]
        source.give(2)
        feed.stop()
        source.give(1)
        assert feed.wait(PATIENCE)


def test_bad_options(tiny: livevlm.Checkpoint, video: SyntheticVideo) -> None:
    stream = Stream(*tiny)
    for options in ({"clip_frames": 0}, {"queue_frames": 0}, {"max_delay": -1}, {"drop": "some"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            stream.watching(timed(video), **options)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="one frame at a time"), stream.watching([(0.0, video.frames)]) as feed:
        feed.wait(PATIENCE)
    sizes = [(0.0, video.frames[0]), (1.0, video.frames[0][:, :30])]
    with pytest.raises(FrameError, match="cannot change"), stream.watching(sizes) as feed:
        feed.wait(PATIENCE)
    assert stream.stats().num_frames == 1
