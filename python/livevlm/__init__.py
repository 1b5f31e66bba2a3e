# SPDX-License-Identifier: Apache-2.0
"""livevlm: video language models that watch a stream for hours and answer at once.

model, processor, config = livevlm.load("tiny")
stream = livevlm.Stream(model, processor, config)
stream.push(frames)
print(stream.ask("what colour was the star ?"))
"""

from livevlm.answer import Answer, Evidence
from livevlm.cache import LiveCache
from livevlm.config import Config
from livevlm.errors import (
    ConfigError,
    FrameError,
    LiveVLMError,
    ModelError,
    QuestionError,
    StateError,
    VideoError,
)
from livevlm.load import Checkpoint, load
from livevlm.processing import Processor
from livevlm.stream import Stream, StreamStats
from livevlm.video import open_video

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Evidence",
    "FrameError",
    "LiveCache",
    "LiveVLMError",
    "ModelError",
    "Processor",
    "QuestionError",
    "StateError",
    "Stream",
    "StreamStats",
    "VideoError",
    "load",
    "open_video",
]
