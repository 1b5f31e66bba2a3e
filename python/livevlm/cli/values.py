# SPDX-License-Identifier: Apache-2.0
"""Times and budgets as people write them."""

from __future__ import annotations

import re
from typing import Any

import click

from livevlm.config import parse_bytes
from livevlm.errors import ConfigError


def parse_time(text: str) -> float:
    """Seconds of "42", "42.5", "00:42" or "1:02:03".

    Raises:
        ConfigError: anything else.
    """
    first, *rest = text.split(":")
    whole = re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text) is not None
    if not whole or any(float(part) >= 60 for part in rest):
        raise ConfigError(f"time {text!r} is not understood; allowed: SS, MM:SS or HH:MM:SS")
    seconds = float(first)
    for part in rest:
        seconds = seconds * 60 + float(part)
    return seconds


def format_time(seconds: float) -> str:
    """Whole seconds as minutes and seconds, "01:04", or with hours, "1:02:03"."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


class TimeType(click.ParamType):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_time(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def budget_settings(text: str, num_video_tokens: int | None) -> dict[str, Any]:
    """Config settings for `--budget`: tokens ("12000"), a share of the video's tokens ("25%"), or bytes ("2GiB").

    Raises:
        ConfigError: not understood, not positive, or a share of a stream whose length is not known.
    """
    text = text.strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ConfigError(f"budget {text!r} must be above 0% and at most 100%")
        if num_video_tokens is None:
            raise ConfigError(f"budget {text!r} is a share of a length that is not known here; give tokens or bytes")
        return {"budget": max(1, int(share * num_video_tokens)), "max_memory": None}
    if re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise ConfigError(f"budget {text} must be at least 1 token")
        return {"budget": int(text), "max_memory": None}
    try:
        parse_bytes(text)
    except ConfigError:
        raise ConfigError(
            f"budget {text!r} is not understood; allowed: tokens (12000), a share (25%), bytes (2GiB)"
        ) from None
    return {"max_memory": text}
