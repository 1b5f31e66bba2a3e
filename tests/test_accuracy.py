# SPDX-License-Identifier: Apache-2.0
"""Answers of the embedded checkpoint at a tenth of the tokens; `livevlm eval synthetic` measures the same in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from livevlm.evaluating.plan import Plan
from livevlm.evaluating.run import compare
from livevlm.evaluating.settings import settings_of


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of all kinds of question, by setting, at a tenth of the tokens if nothing else is said."""
    memories = ("novelty", "similarity", "random", "uniform", "recent")
    settings = [
        *settings_of(["full"], [], ["none", "mean_key-softmax", "mass-25"], ["packed"]),
        *settings_of(memories, [10.0], ["none"], ["packed"]),
        *settings_of(("similarity", "vision_sink", "proxy_query", "uniform", "recent"), [25.0], ["none"], ["packed"]),
    ]
    folder: Path = tmp_path_factory.mktemp("accuracy")
    rows = compare(Plan(tuple(settings), frames=(64,), streams=6, seed=77), folder, plots=False).rows
    tokens = {None: 1024, 25.0: 256, 10.0: 102}
    assert all(row.tokens == tokens[row.budget] and row.tokens_seen == 1024 for row in rows)
    return {row.setting + " at 25 %" * (row.budget == 25): row.all_kinds for row in rows}


def test_full_memory_answers_nearly_everything(accuracy: dict[str, float]) -> None:
    assert accuracy["full"] >= 0.95, accuracy


def test_eviction_keeps_the_answers(accuracy: dict[str, float]) -> None:
    assert accuracy["novelty"] >= 0.92, accuracy
    assert accuracy["similarity"] >= 0.9, accuracy
    for baseline in ("random", "uniform", "recent"):
        assert accuracy["novelty"] - accuracy[baseline] >= 0.1, accuracy


def test_eviction_to_a_quarter_keeps_the_answers(accuracy: dict[str, float]) -> None:
    assert accuracy["similarity at 25 %"] >= 0.94, accuracy
    assert accuracy["vision_sink at 25 %"] >= 0.9, accuracy
    assert accuracy["proxy_query at 25 %"] >= 0.86, accuracy
    for baseline in ("uniform", "recent"):
        assert accuracy["similarity at 25 %"] - accuracy[f"{baseline} at 25 %"] >= 0.1, accuracy


def test_retrieval_keeps_the_answers(accuracy: dict[str, float]) -> None:
    assert accuracy["full + mean_key-softmax"] >= 0.88, accuracy
    assert accuracy["full + mass-25"] >= accuracy["full"] - 0.02, accuracy
