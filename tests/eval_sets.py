# SPDX-License-Identifier: Apache-2.0
"""Entries of annotation files about one generated video, and a stand-in for the model that answers by the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIONS = ["red", "green", "blue", "white"]
LETTERED = ["A. red", "B. green", "C. blue", "D. white"]
SECONDS = 12


class Script:
    """Replies by what a prompt holds; remembers how many seconds had been seen."""

    def __init__(self, **replies: str) -> None:
        self.replies = replies
        self.seen: dict[str, list[float]] = {}
        self.prompts: dict[str, str] = {}

    def __call__(self, prompt: str, times: list[float]) -> str:
        for word, reply in self.replies.items():
            if f"{word}?" in prompt:
                self.seen[word], self.prompts[word] = times, prompt
                return reply
        raise AssertionError(prompt)


def averages(result: dict[str, Any], metric: str) -> dict[str, float | None]:
    return {label: values[metric] for label, values in result["method"]["averages"].items()}


def real(question: str, stamp: str, answer: str, task: str, options: list[str] = OPTIONS) -> dict[str, Any]:
    return {
        "task_type": task, "question": f"{question}?", "time_stamp": stamp, "answer": answer, "options": options,
        "required_ability": "working memory",
    }  # fmt: skip


def rvs_entry(path: str, ends: list[float], **more: Any) -> dict[str, Any]:
    turns = [{"question": f"q{end}?", "answer": "Red.", "start_time": 0, "end_time": end} for end in ends]
    return {"video_id": Path(path).stem, "video_path": path, "duration": SECONDS, "conversations": turns, **more}


VIDEOMME = [
    {
        "videoID": "v", "question_id": f"00{i}-1", "duration": duration, "domain": "x", "sub_category": "y",
        "task_type": "Counting", "question": f"{word}?", "options": LETTERED, "answer": answer,
    }
    for i, (word, duration, answer) in enumerate([("a", "short", "A"), ("b", "short", "B"), ("c", "long", "C")])
]  # fmt: skip
