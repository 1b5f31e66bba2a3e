# SPDX-License-Identifier: Apache-2.0
"""livevlm: video language models that watch a stream for hours and answer at once.

model, processor, config = livevlm.load("tiny")
stream = livevlm.Stream(model, processor, config)
stream.push(frames)
print(stream.ask("what colour was the star ?"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from livevlm.answer import Answer
    from livevlm.cache import LiveCache
    from livevlm.checkpoint import Checkpoint, load
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
    from livevlm.evidence import Evidence
    from livevlm.feed import Feed, FeedStats
    from livevlm.processing import Processor
    from livevlm.stream import Stream, StreamStats
    from livevlm.video import open_video

# Where each public name lives. Imported at first use: torch and transformers take seconds, `livevlm --help` needs none.
_HOME = {
    "Answer": "answer",
    "Checkpoint": "checkpoint",
    "Config": "config",
    "ConfigError": "errors",
    "Evidence": "evidence",
    "Feed": "feed",
    "FeedStats": "feed",
    "FrameError": "errors",
    "LiveCache": "cache",
    "LiveVLMError": "errors",
    "ModelError": "errors",
    "Processor": "processing",
    "QuestionError": "errors",
    "StateError": "errors",
    "Stream": "stream",
    "StreamStats": "stream",
    "VideoError": "errors",
    "load": "checkpoint",
    "open_video": "video",
}

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Evidence",
    "Feed",
    "FeedStats",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'livevlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"livevlm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
