# SPDX-License-Identifier: Apache-2.0
"""Results: a JSON file that is updated part by part, and the same rows as CSV."""

from __future__ import annotations

import csv
import datetime
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from livevlm.benchmark.timing import spread


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        system: "livevlm", "stock" (in clips, everything kept), "stock one-shot", or "floor".
        metric: what was measured, with its unit: "TTFT ms", "decode ms/token", "encode ms/frame", "GPU peak GB" ...
        history: frames seen before, or None.
        frames: frames a call, or None.
        note: what is special about it, or why there is no value.
    """

    part: str
    system: str
    metric: str
    history: int | None
    frames: int | None
    median: float | None
    p20: float | None = None
    p80: float | None = None
    samples: int = 1
    note: str = ""

    def line(self) -> str:
        """For people."""
        after = "" if self.history is None else f"after {self.history} frames"
        calls = "" if self.frames is None else f"{self.frames} a call"
        if self.median is None:
            value = "-"
        else:
            value = f"{self.median:.2f}" + (f" ({self.p20:.2f} to {self.p80:.2f})" if self.samples > 1 else "")
        words = f"{self.part:<8} {self.system:<22} {after:<19} {calls:<9} {self.metric:<20} {value:>26}  {self.note}"
        return words.rstrip()


class Report:
    """The rows of one subject on one device, in `<folder>/<name>.json` and `.csv`."""

    def __init__(self, folder: Path, name: str, facts: dict[str, Any]) -> None:
        self.path = folder / f"{name}.json"
        self.facts = facts
        self.rows: list[Row] = []
        if self.path.exists():
            known = {field.name for field in fields(Row)}
            found = json.loads(self.path.read_text())
            self.rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in found["rows"]]
        folder.mkdir(parents=True, exist_ok=True)

    def replace(self, part: str, rows: Iterable[Row], **facts: Any) -> None:
        """Puts a part's rows in the place of its old ones, and writes the files."""
        self.rows = [row for row in self.rows if row.part != part] + list(rows)
        stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        known = json.loads(self.path.read_text())["parts"] if self.path.exists() else {}
        content = {"parts": {**known, part: {"date": stamp, **self.facts, **facts}}}
        self.path.write_text(json.dumps({**content, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")
        with self.path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def row(part: str, system: str, metric: str, samples: Sequence[float], **columns: Any) -> Row:
    """The spread of samples."""
    median, p20, p80 = (round(value, 4) for value in spread(samples))
    facts = {"history": None, "frames": None, **columns}
    return Row(part, system, metric, median=median, p20=p20, p80=p80, samples=len(samples), **facts)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "stock_cudnn_attention": False,
    }
