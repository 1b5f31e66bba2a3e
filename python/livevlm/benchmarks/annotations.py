# SPDX-License-Identifier: Apache-2.0
"""Annotation files, JSON, JSON lines, CSV or parquet, entry by entry, with the line at which each begins."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from livevlm.benchmarks.schema import Malformed, Problem
from livevlm.errors import ConfigError

SPACE = " \t\r\n"


class Entry(NamedTuple):
    value: Any
    where: str  # file:line, file:row of a parquet file


def read_entries(path: Path) -> Iterator[Entry | Problem]:
    """Entries of a JSON list, of a file with one JSON value a line, or of a table whose first line names its columns.

    A line that is no JSON is one problem. In a list nothing after broken JSON can be read: that is one problem too, as
    is a file that cannot be read, or that holds something else.

    Raises:
        ConfigError: a parquet file, and no pyarrow is installed.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(f"{path}:1", f"cannot be read: {error}")
        return
    start = _skip(text, 0, SPACE)
    if path.suffix == ".csv":
        yield from _rows(path, text)
    elif text[start : start + 1] == "[" and path.suffix != ".jsonl":
        yield from _list(path, text, start + 1)
    elif path.suffix == ".jsonl" or _is_json(text[start:].partition("\n")[0]):
        yield from _lines(path, text)
    else:
        yield Problem(f"{path}:1", "allowed are a JSON list of entries, or one entry a line")


def read_beside(path: Path) -> Any:
    """JSON of a file that entries of an annotation file refer to; read again only if it has changed.

    Raises:
        Malformed: it cannot be read.
    """
    try:
        return _read_json(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise Malformed(f"{path}, which belongs to it, cannot be read: {error}") from None


@lru_cache(maxsize=4)
def _read_json(path: Path, modified: int) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _parquet(path: Path) -> Iterator[Entry | Problem]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install 'livevlm[parquet]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        yield Problem(f"{path}:1", f"cannot be read: {error}")
        return
    for number, row in enumerate(rows, 1):
        yield Entry(row, f"{path}:{number}")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _lines(path: Path, text: str) -> Iterator[Entry | Problem]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield Entry(json.loads(line), where)
            except json.JSONDecodeError as error:
                yield Problem(where, f"not valid JSON: {error.msg}")


def _rows(path: Path, text: str) -> Iterator[Entry | Problem]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    while True:
        where = f"{path}:{rows.line_num + 1}"  # where the row begins: it may go over several lines
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Problem(where, f"not valid CSV ({error}); nothing from here on was read")
            return
        if row is None:
            return
        if not names:
            names = row
        elif len(row) == len(names):
            yield Entry(dict(zip(names, row, strict=True)), where)
        elif row:
            yield Problem(where, f"{len(row)} fields; the first line names {len(names)}")


def _list(path: Path, text: str, at: int) -> Iterator[Entry | Problem]:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        at = _skip(text, at, SPACE + ",")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            behind = _skip(text, at + 1, SPACE)
            if behind < len(text):
                yield Problem(
                    f"{path}:{line + text.count(chr(10), at, behind)}", "not read: it stands behind the list's end"
                )
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
