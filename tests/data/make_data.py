# SPDX-License-Identifier: Apache-2.0
"""Make the small media files the tests read.  Needs PyAV (``pip install av``), which the tests do not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HERE = Path(__file__).parent
FRAME_TIMES_MS = (0, 100, 200, 1500, 1600, 4000, 4100, 5000)
"""When the frames of ``variable_rate.mp4`` are shown; frame ``i`` is grey, of level ``20 + 25 * i``."""


def make_audio_only() -> None:
    """Half a second of a 440 Hz tone in an MP4 container, with no video stream."""
    rate, size = 16000, 1024
    with av.open(str(HERE / "audio_only.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=rate)
        stream.layout = "mono"
        for begin in range(0, rate // 2, size):
            tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(begin, begin + size) / rate)
            frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = rate, begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_variable_rate() -> None:
    """A video whose frames come at irregular times."""
    with av.open(str(HERE / "variable_rate.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "10", "bf": "0"}
        for index, milliseconds in enumerate(FRAME_TIMES_MS):
            grey = np.full((48, 64, 3), 20 + 25 * index, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    make_audio_only()
    make_variable_rate()
