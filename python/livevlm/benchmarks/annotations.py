# SPDX-License-Identifier: Apache-2.0
"""Annotation files, JSON or JSON lines, entry by entry, with the line at which each begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from livevlm.benchmarks.schema import Problem
from livevlm.errors import ConfigError

SPACE = " \t\r\n"


class Entry(NamedTuple):
    value: Any
    where: str  # file:line


def read_entries(path: Path) -> Iterator[Entry | Problem]:
    """Entries of a JSON list, or of a file with one JSON value a line.

    A line that is no JSON is one problem. In a list nothing after broken JSON can be read: that is one problem too.

    Raises:
        ConfigError: the file cannot be read, or holds neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    start = _skip(text, 0, SPACE)
    if path.suffix == ".jsonl" or text[start : start + 1] == "{":
        yield from _lines(path, text)
    elif text[start : start + 1] == "[":
        yield from _list(path, text, start + 1)
    else:
        raise ConfigError(f"{path}: allowed are a JSON list of entries, or one entry a line")


def _lines(path: Path, text: str) -> Iterator[Entry | Problem]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield Entry(json.loads(line), where)
            except json.JSONDecodeError as error:
                yield Problem(where, f"not valid JSON: {error.msg}")


def _list(path: Path, text: str, at: int) -> Iterator[Entry | Problem]:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        at = _skip(text, at, SPACE + ",")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield Problem(f"{path}:{error.lineno}", f"not valid JSON ({error.msg}); nothing from here on was read")
            return
        yield Entry(value, f"{path}:{line}")


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at
