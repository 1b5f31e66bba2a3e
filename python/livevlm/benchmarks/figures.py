# SPDX-License-Identifier: Apache-2.0
"""Accuracies of a set of answers: of tasks, of groups, and the averages that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from livevlm.benchmarks.format import Average, Format

Answers = Sequence[dict[str, Any]]
METRICS = ("strict", "official", "judged")


def accuracy(answers: Answers, metric: str) -> float | None:
    """Share of right ones among those that could be decided."""
    decided = [answer[metric] for answer in answers if answer.get(metric) is not None]
    return sum(decided) / len(decided) if decided else None


def split(answers: Answers, field: str) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        parts.setdefault(answer.get(field) or "", []).append(answer)
    return dict(sorted(parts.items(), key=lambda part: (float(part[0]) if part[0].isdecimal() else 0.0, part[0])))


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def over_tasks(answers: Answers, metric: str) -> float | None:
    # One name may stand for tasks of two groups (StreamingBench).
    parts = [part for group in split(answers, "group").values() for part in split(group, "task").values()]
    return mean([accuracy(part, metric) for part in parts])


def of_group(answers: Answers, metric: str, form: Format) -> float | None:
    return over_tasks(answers, metric) if form.group_over == "tasks" else accuracy(answers, metric)


def average(answers: Answers, which: Average, metric: str, form: Format) -> float | None:
    """None if a group that it needs has no answer."""
    groups = split(answers, "group")
    if any(group not in groups for group in which.groups):
        return None
    chosen = which.groups or tuple(groups)
    if which.over == "groups":
        return mean([of_group(groups[group], metric, form) for group in chosen])
    part = [answer for group in chosen for answer in groups[group]]
    return over_tasks(part, metric) if which.over == "tasks" else accuracy(part, metric)


def figures(answers: Answers, form: Format) -> dict[str, Any]:
    """Everything about the answers of one way of watching."""

    def metrics(part: Answers) -> dict[str, Any]:
        return {"num_answers": len(part), **{metric: accuracy(part, metric) for metric in METRICS}}

    return {
        "policy": answers[0]["policy"] if answers else None,
        "averages": {
            which.label: {metric: average(answers, which, metric, form) for metric in METRICS}
            for which in form.averages
        },
        "groups": {
            name or "(none)": {**metrics(part), **{metric: of_group(part, metric, form) for metric in METRICS}}
            for name, part in split(answers, "group").items()
        },
        "tasks": {
            f"{group}: {name}" if group else name or "(none)": metrics(part)
            for group, of in split(answers, "group").items()
            for name, part in split(of, "task").items()
        },
        "judge_score": mean([answer.get("judge_score") for answer in answers]),
        "num_undecided": undecided(answers),
        "num_past_end": sum(bool(answer["past_end"]) for answer in answers),
        "evidence_found": evidence_found(answers),
        "evidence_inside": evidence_inside(answers),
        "ttft_ms": _median(answers, "ttft_ms"),
        "ms_per_token": _median(answers, "ms_per_token"),
        "num_video_tokens": max((answer["num_video_tokens"] for answer in answers), default=None),
        "kv_bytes": max((answer["kv_bytes"] for answer in answers), default=None),
        "num_frames": max((answer["num_frames"] for answer in answers), default=None),
    }


def evidence_found(answers: Answers) -> float | None:
    """Of the questions whose evidence is known: the share where a frame that the answer rests on lies in it."""
    return mean([float(any(hits)) for hits in _hits(answers)])


def evidence_inside(answers: Answers) -> float | None:
    """Of the frames that those answers rest on: the share that lies in the evidence."""
    return mean([float(hit) for hits in _hits(answers) for hit in hits])


def _hits(answers: Answers) -> list[list[bool]]:
    """For each question whose evidence is known: which of its answer's frames lie in it."""
    return [
        [any(start <= time <= end for start, end in answer["windows"]) for time in answer["evidence"]]
        for answer in answers
        if answer.get("windows")
    ]


def undecided(answers: Answers) -> int | None:
    """Open answers that the judge said nothing clear about; None without a judge."""
    judged = [answer for answer in answers if answer["kind"] == "open" and answer["judge"] != "none"]
    return sum(answer.get("judged") is None for answer in judged) if judged else None


def _median(answers: Answers, name: str) -> float | None:
    values = [answer[name] for answer in answers if answer.get(name) is not None]
    return median(values) if values else None
