# SPDX-License-Identifier: Apache-2.0
"""`summary.json` and `summary.md` of a folder of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from livevlm.benchmarks.figures import METRICS, figures
from livevlm.benchmarks.format import Format
from livevlm.benchmarks.identity import RUN_FILE
from livevlm.benchmarks.registry import FORMATS
from livevlm.benchmarks.results import read_all
from livevlm.benchmarks.schema import LETTERS
from livevlm.benchmarks.scoring import find_letter
from livevlm.benchmarks.shards import ended
from livevlm.benchmarks.viewer import CONTROL, METHOD
from livevlm.errors import ConfigError

NONE = "–"  # noqa: RUF001


def summarize(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Adds up the answers of all processes and writes both files; returns the figures and the files.

    Raises:
        ConfigError: there are no answers, or of different runs.
    """
    answers = read_all(folder)
    if not answers or not (folder / RUN_FILE).exists():
        raise ConfigError(f"{folder} holds no answers")
    hashes = {answer["config_hash"] for answer in answers}
    if len(hashes) > 1:
        raise ConfigError(f"{folder} holds answers of {len(hashes)} configurations; they cannot be added up")
    form, judge = FORMATS[answers[0]["benchmark"]], answers[0]["judge"]
    problems, num_queries, outdated = ended(folder)
    num_found = len(answers)
    answers = [answer for answer in answers if answer["query"] not in outdated]
    if not answers:
        raise ConfigError(f"{folder} holds no answers but {num_found} to questions that have changed since")
    result = {
        "benchmark": form.name,
        "run": json.loads((folder / RUN_FILE).read_text()),
        "judge": judge,
        "versions": sorted({f"livevlm {answer['livevlm']}, git {answer['git']}" for answer in answers}),
        "devices": sorted({answer["device"] for answer in answers}),
        "num_queries": num_queries,
        "num_outdated": num_found - len(answers),
        **{
            role: figures([answer for answer in answers if answer["role"] == role], form)
            for role in (METHOD, CONTROL)
            if any(answer["role"] == role for answer in answers)
        },
        "num_skipped": len(problems),
        "skipped": [problem._asdict() for problem in problems],
    }
    files = [_write(folder / "summary.json", json.dumps(result, indent=2) + "\n")]
    files.append(_write(folder / "summary.md", markdown(result, form)))
    if form.name == "egoschema":
        files.append(_write(folder / "submission.csv", _submission(answers)))
    return result, files


def markdown(result: dict[str, Any], form: Format) -> str:
    roles = [role for role in (METHOD, CONTROL) if role in result]
    run = result["run"]
    labels = {role: f"{result[role]['policy']}{' (control)' if role == CONTROL else ''}" for role in roles}
    used = [m for m in METRICS if any(v[m] is not None for r in roles for v in result[r]["tasks"].values())]
    heads = [f"{labels[role]}, {metric}" for metric in used for role in roles]

    def table(name: str, part: str, count: bool) -> list[str]:
        rows = list(dict.fromkeys(key for role in roles for key in result[role][part]))
        lines = [
            f"| {' | '.join([name, *(['answers'] if count else []), *heads])} |",
            "|" + "---|" * (1 + count + len(heads)),
        ]
        for row in rows:
            of = {role: result[role][part].get(row, {}) for role in roles}
            cells = [str(of[roles[0]].get("num_answers", 0))] if count else []
            cells += [_percent(of[role].get(metric)) for metric in used for role in roles]
            lines.append(f"| {' | '.join([row, *cells])} |")
        return [*lines, ""]

    text = [
        f"# {form.title}",
        "",
        f"Model `{run['model']}`, {run['fps']:g} frames a second, judge {result['judge']}.",
        "",
    ]
    text += table("average", "averages", False)
    if set(result[roles[0]]["groups"]) != {"(none)"}:
        text += table("group", "groups", True)
    text += table("task", "tasks", True)
    facts: list[tuple[str, str, Callable[[Any], str]]] = [
        ("judge's mean score, 0 to 5", "judge_score", _number),
        ("answers that the judge did not decide", "num_undecided", str),
        ("questions asked past the video's end", "num_past_end", str),
        ("evidence found", "evidence_found", _percent),
        ("frames looked up inside of the evidence", "evidence_inside", _percent),
        ("TTFT, ms, median", "ttft_ms", _number),
        ("ms per further token, median", "ms_per_token", _number),
        ("video tokens held, most", "num_video_tokens", str),
        ("KV bytes, most", "kv_bytes", str),
        ("frames fed, most", "num_frames", str),
    ]
    text += [f"| | {' | '.join(labels[role] for role in roles)} |", "|" + "---|" * (1 + len(roles))]
    for name, key, shown in facts:
        values = [result[role][key] for role in roles]
        if any(value is not None for value in values):
            text.append(f"| {name} | {' | '.join(NONE if v is None else shown(v) for v in values)} |")
    answered = " and ".join(str(sum(t["num_answers"] for t in result[role]["tasks"].values())) for role in roles)
    text += ["", f"{result['num_queries']} questions about videos that were found; answers: {answered}."]
    if result["num_outdated"]:
        text.append(f"{result['num_outdated']} answers to questions that have changed since are left out.")
    text += [f"Skipped: {result['num_skipped']}." if result["num_skipped"] else "Nothing was skipped.", ""]
    text += [f"- {problem['where']}: {problem['what']}" for problem in result["skipped"]]
    return "\n".join(text).rstrip() + "\n"


def _submission(answers: list[dict[str, Any]]) -> str:
    """For EgoSchema's server: the option of each video, counted from 0; -1 where the reply names none."""
    rows = ["q_uid,answer"]
    for answer in answers:
        if answer["role"] == METHOD:
            letter = find_letter(answer["reply"], answer["options"])
            rows.append(f"{answer['name'] or answer['video']},{-1 if letter is None else LETTERS.index(letter)}")
    return "\n".join(rows) + "\n"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _write(path: Path, text: str) -> Path:
    """Whole or not at all: two processes may end at once."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)
    return path
