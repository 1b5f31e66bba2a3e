# SPDX-License-Identifier: Apache-2.0
"""Look into a file that cannot be read as a video, to tell the user why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from livevlm.errors import VideoError

MAX_SCAN = 4 * 1024 * 1024
"""How many bytes of an index are searched."""


def check_file(path: str) -> None:
    """Raise VideoError unless there is a file at ``path`` with something in it that may be read."""
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"{path}: is a directory, not a video file")
    if not os.path.isfile(path):
        raise VideoError(f"{path}: is not a regular file")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: no permission to read it")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty")


def explain_unreadable(path: Path) -> str:
    """Return why the file at ``path`` cannot be opened as a video, as the end of a sentence."""
    try:
        with path.open("rb") as file:
            head = file.read(MAX_SCAN)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if _is_mp4(head):
        boxes = dict(_top_level_boxes(path))
        if b"moov" not in boxes:
            return "the file is incomplete, its index is missing: the recording or the download was cut short"
        with path.open("rb") as file:
            file.seek(boxes[b"moov"])
            index = file.read(MAX_SCAN)
        audio_only = b"soun" in index and b"vide" not in index
    else:
        audio_only = _is_sound_file(head)
    if audio_only:
        return "there is no video stream in it, only sound"
    return "not a video, or of a kind OpenCV cannot decode"


def has_exact_frame_count(path: Path) -> bool:
    """Return whether the file's header counts the video frames themselves (MP4 and QuickTime)."""
    with path.open("rb") as file:
        return _is_mp4(file.read(12))


def _is_mp4(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def _top_level_boxes(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (type, offset) of the boxes an MP4 file consists of, as far as they are whole enough to walk."""
    length = os.path.getsize(path)
    offset = 0
    with path.open("rb") as file:
        while offset + 8 <= length:
            file.seek(offset)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:  # the real size follows the type
                size = int.from_bytes(header[8:16], "big")
            yield header[4:8], offset
            if size < 8:  # 0: up to the end of the file
                return
            offset += size


def _is_sound_file(head: bytes) -> bool:
    if head[:4] == b"RIFF":
        return head[8:12] == b"WAVE"
    if head[:4] == b"OggS":
        return b"theora" not in head
    if head[:4] == b"\x1aE\xdf\xa3":  # Matroska or WebM: codec names begin with A_ or V_
        return b"A_" in head and b"V_" not in head
    is_mpeg_audio = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head[:4] == b"fLaC" or head[:3] == b"ID3" or is_mpeg_audio
