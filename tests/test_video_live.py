# SPDX-License-Identifier: Apache-2.0
"""Live sources: a camera's times, and what is said of one that is not there."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from livevlm.errors import VideoError
from livevlm.video import open_video


@pytest.mark.parametrize("source", ["63", "/dev/video63", "rtsp://127.0.0.1:9/nothing", "http://127.0.0.1:9/x.mp4"])
def test_live_source_that_is_not_there(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VideoError, match="cannot connect to this camera or address"):
        open_video(source)
    assert capfd.readouterr().err == ""


class FakeCamera:
    """A camera at 10 frames a second, with or without timestamps that count from when it was plugged in."""

    stamped = True
    clock = 0.0

    def __init__(self, index: int) -> None:
        assert index == 3
        self.frame = -1

    def isOpened(self) -> bool:
        return True

    def grab(self) -> bool:
        self.frame += 1
        FakeCamera.clock = 500 + self.frame / 10
        return self.frame < 35

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.full((4, 6, 3), (self.frame, 0, 7), dtype=np.uint8)

    def get(self, name: int) -> float:
        known = {cv2.CAP_PROP_FRAME_WIDTH: 6.0, cv2.CAP_PROP_FRAME_HEIGHT: 4.0, cv2.CAP_PROP_FPS: 10.0}
        if name == cv2.CAP_PROP_POS_MSEC and self.stamped:
            return 1e6 + 100.0 * self.frame
        return known.get(name, -1.0)

    def set(self, name: int, value: float) -> bool:
        return False

    def release(self) -> None:
        pass


@pytest.mark.parametrize("stamped", [True, False])
def test_camera(monkeypatch: pytest.MonkeyPatch, stamped: bool) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    monkeypatch.setattr(FakeCamera, "stamped", stamped)
    monkeypatch.setattr(FakeCamera, "clock", 500.0)
    monkeypatch.setattr("livevlm.video.time.monotonic", lambda: FakeCamera.clock)
    with open_video("3") as reader:
        assert reader.is_live
        assert reader.duration is None
        assert reader.num_frames_estimate is None
        assert reader.size == (6, 4)
        frames = list(reader)
    assert [time for time, _ in frames] == pytest.approx([0, 1, 2, 3])
    assert [frame[2, 0, 0].item() for _, frame in frames] == [0, 10, 20, 30]
    assert frames[0][1][0].unique().tolist() == [7], "red comes first"
