# SPDX-License-Identifier: Apache-2.0
"""Answers on disk: a JSON line each, there for good as soon as it is written."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from livevlm.errors import ConfigError

PATTERN = "answers.*of*.jsonl"


def read_answers(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and answers. A last line that was torn by a crash is left out.

    Raises:
        ConfigError: another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what is behind the last line break was never finished
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError
        except ValueError:
            if number == len(lines) - 1:
                return
            raise ConfigError(f"{path}:{number}: not an answer; delete this line") from None
        yield number, value


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Answers of all processes, each once."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for path in sorted(folder.glob(PATTERN)):
        for _, answer in read_answers(path):
            found.setdefault((answer.get("role"), answer.get("query")), answer)
    return list(found.values())


def outdated(answers: list[dict[str, Any]], keys: set[str], files: Sequence[Path]) -> list[str]:
    """Keys of answers to questions that these annotation files no longer hold as they were."""
    videos = {key.rpartition("/")[0] for key in keys}
    names = set(map(str, files))
    return sorted(
        {
            answer["query"]
            for answer in answers
            if answer["query"] not in keys
            and answer["query"].rpartition("/")[0] in videos
            and answer["where"].rpartition(":")[0] in names
        }
    )


class AnswerFile:
    """The file that one process appends to.

    Raises:
        ConfigError: another process writes to it, or its answers are of another configuration or judge.
    """

    def __init__(self, folder: Path, rank: int, world: int, config_hash: str) -> None:
        self.path = folder / f"answers.{rank}of{world}.jsonl"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(f"{self.path}: another process writes to it") from None
        try:
            self._drop_torn_line()
            for path in sorted(folder.glob(PATTERN)):
                for number, answer in read_answers(path):
                    if answer.get("config_hash") != config_hash:
                        raise ConfigError(
                            f"{path}:{number}: an answer of another configuration, model or judge "
                            f"({answer.get('model')}, {answer.get('policy')}, judge {answer.get('judge')}); "
                            "take another --out"
                        )
        except BaseException:
            os.close(self._file)
            raise

    def append(self, answer: dict[str, Any]) -> None:
        line = (json.dumps(answer, ensure_ascii=False) + "\n").encode()
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        last = content.rfind(b"\n", 0, max(0, whole - 1)) + 1
        if whole:
            try:
                json.loads(content[last:whole])
            except ValueError:
                whole = last
        if whole < len(content):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
