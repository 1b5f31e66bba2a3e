# SPDX-License-Identifier: Apache-2.0
"""Decoding: which frames come at which times, and what a user is told about a file that is not right."""

from __future__ import annotations

import json
import os
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from livevlm.errors import ConfigError, VideoError
from livevlm.synthetic import generate
from livevlm.video import VideoReader, import_cv2, open_video
from plain_model import answers

SAMPLE = Path(__file__).parents[1] / "examples" / "sample.mp4"
DATA = Path(__file__).parent / "data"
Frames = list[tuple[float, torch.Tensor]]


@pytest.fixture(scope="module")
def sample() -> Frames:
    with open_video(SAMPLE) as reader:
        return list(reader)


def read_until_error(path: Path, **options: float | None) -> tuple[Frames, VideoError]:
    """Return the good frames of a broken file, and the error that ended them."""
    good: Frames = []
    with open_video(path, **options) as reader:
        with pytest.raises(VideoError) as caught:
            good.extend(iter(lambda: next(reader), None))
        with pytest.raises(StopIteration):
            next(reader)
    return good, caught.value


def write_clip(path: Path, width: int, height: int, levels: list[int], fps: float = 10.0) -> None:
    """Write one grey frame for each level; the top quarter of each is black."""
    import_cv2()  # what FFmpeg may say is settled when OpenCV first uses it in a process
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    assert writer.isOpened()
    for level in levels:
        picture = np.full((height, width, 3), level, dtype=np.uint8)
        picture[: height // 4] = 0
        writer.write(picture)
    writer.release()


def test_ticks_that_are_no_binary_fraction(tmp_path: Path) -> None:
    """4200 of 600 ticks are 7 s and not 7.000000000000001, so that a question at 7 s is about this frame too."""
    write_clip(tmp_path / "ticks.avi", 32, 32, [i % 256 for i in range(8 * 600)], fps=600)
    with open_video(tmp_path / "ticks.avi", fps=1.0) as video:
        assert [time for time, _ in video] == list(range(8))


def test_sample_decodes_to_one_frame_a_second(sample: Frames) -> None:
    assert [time for time, _ in sample] == pytest.approx(list(range(64)))
    assert all(frame.shape == (3, 448, 448) and frame.dtype == torch.uint8 for _, frame in sample)
    assert all(frame.permute(1, 2, 0).is_contiguous() for _, frame in sample)  # as decoded: nothing was reordered


def test_sample_shows_the_generated_video(sample: Frames) -> None:
    """Colours, orientation and order: every decoded frame is nearest to the frame it was made from."""
    (video,) = generate(64, seed=json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["seed"])
    decoded = F.avg_pool2d(torch.stack([frame for _, frame in sample]).float(), 4).flatten(1)
    distance = torch.cdist(decoded, video.frames.float().flatten(1))
    assert distance.argmin(1).tolist() == list(range(64))
    assert (decoded - video.frames.float().flatten(1)).abs().mean() < 10


def test_the_checkpoint_answers_every_sample_question(sample: Frames) -> None:
    questions = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["questions"]
    assert len(questions) == 12
    asked = []
    for entry in questions:
        minutes, seconds = map(int, entry["time"].split(":"))
        asked.append((entry["question"], 60 * minutes + seconds))
    given = answers(torch.stack([frame for _, frame in sample]), asked)
    assert given == [entry["answer"] for entry in questions]


def test_attributes() -> None:
    with open_video(SAMPLE) as reader:
        assert reader.path == str(SAMPLE)
        assert reader.size == (448, 448)
        assert reader.duration == pytest.approx(64)
        assert reader.native_fps == pytest.approx(8)
        assert reader.num_frames_estimate == 64
        assert not reader.is_live


@pytest.mark.parametrize(("fps", "count"), [(None, 30), (10.0, 30), (100.0, 30), (5.0, 15), (4.0, 12), (0.5, 2)])
def test_sampling(tmp_path: Path, fps: float | None, count: int) -> None:
    levels = list(range(40, 220, 6))
    write_clip(tmp_path / "clip.mp4", 64, 48, levels)
    with open_video(tmp_path / "clip.mp4", fps=fps) as reader:
        frames = list(reader)
        assert reader.num_frames_estimate == len(frames) == count
    for place, (time, frame) in enumerate(frames):
        due = place / (10.0 if fps is None else min(fps, 10.0))
        assert due - 0.001 <= time < due + 0.1, "the first frame at or after the moment it is due"
        assert frame[:, 24:].float().mean() == pytest.approx(levels[round(time * 10)], abs=4)


def test_variable_frame_rate() -> None:
    """Times are those of the file, whatever its average rate."""
    with open_video(DATA / "variable_rate.mp4", fps=None) as reader:
        every = [(time, round((frame.float().mean().item() - 20) / 25)) for time, frame in reader]
    times = [0, 0.1, 0.2, 1.5, 1.6, 4.0, 4.1, 5.0]
    assert [time for time, _ in every] == pytest.approx(times)
    assert [place for _, place in every] == list(range(8))
    with open_video(DATA / "variable_rate.mp4", fps=1) as reader:
        assert [time for time, _ in reader] == pytest.approx([0, 1.5, 4.0, 5.0])


def test_rotated_video_comes_upright(tmp_path: Path) -> None:
    """A phone film: stored lying on its side, with a note in the header to turn it by a quarter."""
    path = tmp_path / "phone.mp4"
    write_clip(path, 64, 48, [200] * 5)
    upright = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    data = path.read_bytes()
    track = data.index(b"tkhd")
    matrix = data.index(b"".join(value.to_bytes(4, "big", signed=True) for value in upright), track)
    replacement = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(data[:matrix] + replacement + data[matrix + 36 :])
    with open_video(path) as reader:
        assert reader.size == (48, 64)
        _, frame = next(reader)
    assert frame.shape == (3, 64, 48)
    dark = (frame[0] < 100).float()
    assert dark[:, -12:].mean() > 0.9, "what was at the top is on the right"
    assert dark[:, :-16].mean() < 0.1


def test_cut_short_keeps_the_good_frames(tmp_path: Path, sample: Frames) -> None:
    data = SAMPLE.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) // 2])
    good, error = read_until_error(path)
    assert 10 < len(good) < 60
    for (time, frame), (whole_time, whole_frame) in zip(good[:-2], sample, strict=False):
        assert time == pytest.approx(whole_time)
        assert torch.equal(frame, whole_frame)
    assert "cut.mp4: broke off at 00:" in str(error)
    assert " of 01:04.0: the file is cut short or damaged" in str(error)


def test_whole_file_does_not_break_off(tmp_path: Path) -> None:
    """The control of the test above: the last byte is all that need be there."""
    path = tmp_path / "whole.mp4"
    path.write_bytes(SAMPLE.read_bytes())
    with open_video(path) as reader:
        assert len(list(reader)) == 64
        with pytest.raises(StopIteration):
            next(reader)


def test_frame_that_does_not_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """The real thing up to the fourth frame.  Not a subclass: instances of one crash Python's collector."""

        def __init__(self, *args: object) -> None:
            self.real = real(*args)
            self.retrieved = 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def retrieve(self) -> tuple[bool, object]:
            self.retrieved += 1
            return self.real.retrieve() if self.retrieved <= 3 else (False, None)

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Broken)
    good, error = read_until_error(SAMPLE)
    assert [time for time, _ in good] == pytest.approx([0, 1, 2])
    assert "the frame at 00:03.0 could not be decoded" in str(error)


def text_file(path: Path) -> None:
    path.write_text("This is not a video.\n" * 50, encoding="utf-8")


def no_index(path: Path) -> None:
    """An MP4 file whose recorder was stopped before it wrote the index."""
    data = SAMPLE.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4] + data[data.index(b"mdat") - 4 :])


def header_only(path: Path) -> None:
    """A whole index, and not one frame behind it."""
    data = SAMPLE.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])


def wav(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


def m4a(path: Path) -> None:
    path.write_bytes((DATA / "audio_only.m4a").read_bytes())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.mp4", lambda path: None, "no such file"),
        ("folder.mp4", Path.mkdir, "is a directory, not a video file"),
        ("pipe.mp4", os.mkfifo, "is not a regular file"),
        ("empty.mp4", Path.touch, "the file is empty"),
        ("text.mp4", text_file, "not a video, or of a kind OpenCV cannot decode"),
        ("cut.mp4", no_index, "its index is missing: the recording or the download was cut short"),
        ("header.mp4", header_only, "no frame of it could be decoded"),
        ("sound.wav", wav, "there is no video stream in it, only sound"),
        ("sound.mp4", wav, "there is no video stream in it, only sound"),
        ("sound.m4a", m4a, "there is no video stream in it, only sound"),
        ("sound2.mp4", m4a, "there is no video stream in it, only sound"),
    ],
)
def test_what_cannot_be_opened(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(VideoError) as caught:
        open_video(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out == printed.err == "", "the decoder's own messages must not reach the user"


def test_damaged_frames_are_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes gone bad in the middle cost a frame there, and nothing after it."""
    data = bytearray(SAMPLE.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000 : 7] = bytes(byte ^ 0xFF for byte in data[middle : middle + 4000 : 7])
    (tmp_path / "damaged.mp4").write_bytes(data)
    with open_video(tmp_path / "damaged.mp4", fps=None) as reader:
        times = [time for time, _ in reader]
        assert 1 <= reader.num_damaged < 8
        assert len(times) == 512 - reader.num_damaged
    assert times == sorted(times)
    assert times[-1] == pytest.approx(63.875)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_bad_fps(fps: float) -> None:
    with pytest.raises(ConfigError, match=r"fps=.*must be a number above 0, or None for every frame"):
        open_video(SAMPLE, fps=fps)


def test_closing_early() -> None:
    with open_video(str(SAMPLE)) as reader:
        assert iter(reader) is reader
        next(reader)
    assert isinstance(reader, VideoReader)
    assert list(reader) == []
    reader.close()


def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks like an address or a number pattern is still the name of a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "take%03d.mp4", "émission 1.mp4", "-i.mp4"):
        Path(name).write_bytes(SAMPLE.read_bytes())
        with open_video(name) as reader:
            assert next(reader)[1].shape == (3, 448, 448)


def test_missing_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(VideoError, match="pip install opencv-python-headless"):
        open_video(SAMPLE)
