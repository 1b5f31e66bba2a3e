# SPDX-License-Identifier: Apache-2.0
"""Results on disk: a line of JSON for each stream and setting, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from livevlm.errors import ConfigError
from livevlm.evaluating.settings import Setting

Key = tuple[int, int, str, str, str, float | None]
"""Frames, number of the stream, and a setting: preset, retrieval, positions, budget."""


def key_of(num_frames: int, index: int, setting: Setting) -> Key:
    return (num_frames, index, setting.preset, setting.retrieval, setting.positions, setting.budget)


class Records:
    """The records in `<folder>/streams.jsonl`, and what they depend on in `<folder>/run.json`.

    Raises:
        ConfigError: the folder holds results of another protocol.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "streams.jsonl"
        about = folder / "run.json"
        if about.exists():
            found = json.loads(about.read_text())
            other = [name for name, value in facts.items() if found.get(name) != value]
            if other:
                raise ConfigError(
                    f"{folder} holds results of another run: "
                    + ", ".join(f"{name}={found.get(name)!r}, now {facts[name]!r}" for name in other)
                    + "; give another --out"
                )
        about.write_text(json.dumps(facts, indent=1) + "\n")
        self.by_key: dict[Key, dict[str, Any]] = {}
        self._read()
        self._file: TextIO = self.path.open("a")

    def _read(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # it was stopped in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(end)
        for line in whole[:end].splitlines():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        num_frames, index, preset, retrieval, positions, budget = record["key"]
        self.by_key[(num_frames, index, preset, retrieval, positions, budget)] = record

    def add(self, record: dict[str, Any]) -> None:
        self._take(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
