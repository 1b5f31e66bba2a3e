# SPDX-License-Identifier: Apache-2.0
"""Every error this library raises on purpose.

Catch :class:`LiveVLMError` to catch them all.  The ones about a value the caller passed are also a
``ValueError``, so code that knows nothing of this library still handles them.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "FrameError",
    "LiveVLMError",
    "ModelError",
    "QuestionError",
    "StateError",
    "VideoError",
]


class LiveVLMError(Exception):
    """Base class of every error raised by livevlm."""


class VideoError(LiveVLMError):
    """A video file, camera or address could not be opened, or broke while it was being decoded."""


class FrameError(LiveVLMError, ValueError):
    """A frame has the wrong shape, type, size or values."""


class QuestionError(LiveVLMError, ValueError):
    """A question is empty, too long, or cannot be turned into tokens."""


class ConfigError(LiveVLMError, ValueError):
    """A setting has a value that is not allowed, or two settings contradict each other."""


class ModelError(LiveVLMError):
    """A model cannot be loaded, or is of a family that is not supported."""


class StateError(LiveVLMError, RuntimeError):
    """A call came at the wrong time, such as a question before the first frame or any call after close."""
