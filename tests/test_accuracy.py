# SPDX-License-Identifier: Apache-2.0
"""Answers of the embedded checkpoint at a quarter of the tokens; `bench/answers.py` measures the same in full."""

from __future__ import annotations

from typing import Any

import pytest

import livevlm
from livevlm import Config
from livevlm.evaluation import answer_synthetic


@pytest.fixture(scope="module")
def accuracy() -> dict[str, float]:
    tiny = livevlm.load("tiny", device="cpu")
    rows: dict[str, dict[str, Any]] = {
        "full": {"policy": "full"},
        "similarity": {"policy": "similarity"},
        "vision_sink": {"policy": "vision_sink", "scope": "shared"},
        "softmax": {"policy": "full", "retrieval": "mean_key", "pooling": "softmax"},
        "uniform": {"policy": "uniform"},
        "recent": {"policy": "recent"},
    }
    result = {}
    for name, settings in rows.items():
        config = Config(**{"budget": 256, "clip_frames": 8, "retrieval": "none", **settings})
        score = answer_synthetic(tiny, config, num_videos=6, num_frames=64, num_questions=16, seed=77)
        assert score.seen == 1024 and score.kept == (1024 if config.policy == "full" else 256)
        result[name] = score.accuracy
    return result


def test_full_memory_answers_nearly_everything(accuracy: dict[str, float]) -> None:
    assert accuracy["full"] >= 0.97, accuracy


def test_eviction_keeps_the_answers(accuracy: dict[str, float]) -> None:
    assert accuracy["similarity"] >= 0.94, accuracy
    assert accuracy["vision_sink"] >= 0.9, accuracy
    for baseline in ("uniform", "recent"):
        assert accuracy["similarity"] - accuracy[baseline] >= 0.1, accuracy


def test_retrieval_keeps_the_answers(accuracy: dict[str, float]) -> None:
    assert accuracy["softmax"] >= 0.88, accuracy
