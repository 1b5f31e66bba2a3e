# SPDX-License-Identifier: Apache-2.0
"""Many processes, as torchrun starts them: each takes its share of the videos, the last one to end adds up."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livevlm.benchmarks.schema import Problem
from livevlm.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Shard:
        """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them."""
        try:
            found = [int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))]
            local = int(os.environ.get("LOCAL_RANK", found[0]))
        except ValueError:
            raise ConfigError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers") from None
        if not 0 <= found[0] < found[1]:
            raise ConfigError(f"RANK={found[0]} must lie between 0 and WORLD_SIZE={found[1]}")
        return cls(found[0], found[1], local)

    def done_file(self, folder: Path, rank: int | None = None) -> Path:
        return folder / f"done.{self.rank if rank is None else rank}of{self.world}.json"

    def begin(self, folder: Path) -> None:
        """This process is at work: what it said of an earlier run no longer holds."""
        for path in folder.glob("done.*.json"):
            if path == self.done_file(folder) or not path.name.endswith(f"of{self.world}.json"):
                path.unlink(missing_ok=True)

    def end(self, folder: Path, facts: dict[str, Any], problems: list[Problem]) -> bool:
        """Leaves what this process skipped; True if all processes are through."""
        path = self.done_file(folder)
        path.with_suffix(".part").write_text(json.dumps({**facts, "skipped": problems}, indent=2) + "\n")
        path.with_suffix(".part").replace(path)
        return all(self.done_file(folder, rank).exists() for rank in range(self.world))


def ended(folder: Path) -> tuple[list[Problem], int, set[str]]:
    """Of the processes that ended: what they skipped, how many questions there were, keys of outdated answers."""
    problems: list[Problem] = []
    count = 0
    outdated: set[str] = set()
    for path in sorted(folder.glob("done.*.json")):
        found = json.loads(path.read_text())
        count = max(count, found["num_queries"])
        problems += [Problem(*problem) for problem in found["skipped"]]
        outdated |= set(found["outdated"])
    return list(dict.fromkeys(problems)), count, outdated
