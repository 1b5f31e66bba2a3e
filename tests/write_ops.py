# SPDX-License-Identifier: Apache-2.0
"""Calls of all ops that write the memory, for tests that go through every op.

All tensors of a call have the batch first, so that `row[:1]` of each is one sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kit
import livevlm_kernels as lk

FRAMES = 2  # recent ones


@dataclass(frozen=True)
class Call:
    op: str
    makes: tuple[str, ...]  # inputs, see `make`
    run: Callable[..., list[Tensor]]
    exact: bool = False  # moves and choices, which are bit-equal for any memory layout; sums are not


def ascending(rows: tuple[int, ...], length: int, count: int) -> Tensor:
    """`count` of `length` tokens in every row, in order, the last two entries padding."""
    kept = torch.rand(*rows, length).argsort(-1)[..., :count].sort(-1).values
    return torch.cat((kept[..., : count - 2], kept.new_full((*rows, 2), -1)), -1).int()


def make(call: Call, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of a call for keys of `shape` [batch, tokens, heads, dim]."""
    batch, length, heads, dim = shape
    count, patches = max(3, length // 2), max(1, length // 6)
    inputs = {
        "q": lambda: torch.randn(batch, 5, 2 * heads, dim).to(dtype),
        "k": lambda: torch.randn(shape).to(dtype),
        "v": lambda: torch.randn(shape).to(dtype),
        "recent_k": lambda: torch.randn(batch, FRAMES, patches, heads, dim).to(dtype),
        "usual": lambda: torch.randn(batch, patches, heads, dim),
        "scores": lambda: torch.randn(batch, length).to(dtype),
        "slots": lambda: torch.randint(-1, patches, (batch, length), dtype=torch.int32),
        "previous": lambda: torch.randint(-1, length, (batch, length), dtype=torch.int32),
        "groups": lambda: torch.randint(-1, count, (batch, length), dtype=torch.int32),
        "positions": lambda: torch.randint(0, 500, (batch, length), dtype=torch.int32),
        "indices": lambda: ascending((batch,), length, count),
        "head_indices": lambda: ascending((batch, heads), length, count),
        "weights": lambda: torch.rand(batch, length),
        "seq_lens": lambda: torch.arange(length, length - batch, -1).clamp(min=1),
    }
    return {name: inputs[name]().to(device) for name in call.makes}


def blocks(kind: str) -> Callable[..., list[Tensor]]:
    return lambda backend, k, seq_lens: [
        lk.summarize_blocks(k, block_size=8, kind=kind, seq_lens=seq_lens, backend=backend)
    ]


def score(backend: str, q: Tensor, k: Tensor, seq_lens: Tensor) -> list[Tensor]:
    return [lk.score_tokens(q, k, seq_lens=seq_lens, causal=True, backend=backend)]


def score_rotated(backend: str, q: Tensor, k: Tensor, positions: Tensor) -> list[Tensor]:
    half = k.shape[-1] // 2
    angle = torch.arange(500)[:, None] * 1e4 ** -(torch.arange(half) / half)
    cache = torch.cat((angle.cos(), angle.sin()), 1).to(k.device)
    return [lk.score_tokens(q, k, positions=positions, cos_sin_cache=cache, backend=backend)]


def redundancy(backend: str, **inputs: Tensor) -> list[Tensor]:
    return [*lk.score_redundancy(**inputs, backend=backend)]


def novelty(backend: str, k: Tensor, usual: Tensor, **inputs: Tensor) -> list[Tensor]:
    return [*lk.score_novelty(k, usual, **inputs, backend=backend)]


def select(backend: str, scores: Tensor, seq_lens: Tensor) -> list[Tensor]:
    budget = max(1, scores.shape[-1] // 2)
    return [*lk.select_tokens(scores, budget, seq_lens=seq_lens, scatter_ratio=0.5, backend=backend)]


def compact(backend: str, k: Tensor, v: Tensor, indices: Tensor) -> list[Tensor]:
    lk.compact_tokens([k, v], indices, backend=backend)
    return [k, v]


def compact_heads(backend: str, k: Tensor, v: Tensor, head_indices: Tensor) -> list[Tensor]:
    lk.compact_tokens([k, v], head_indices, per_head=True, backend=backend)
    return [k, v]


def evict(**options: Any) -> Callable[..., list[Tensor]]:
    def run(backend: str, k: Tensor, v: Tensor, slots: Tensor) -> list[Tensor]:
        length = k.shape[1]
        frames = {"num_recent_frames": FRAMES, "tokens_per_frame": max(1, length // 6)}
        return [*lk.evict_similar(k, v, slots, length * 2 // 3, **frames, **options, backend=backend), k, v]

    return run


def merge_groups(backend: str, **inputs: Tensor) -> list[Tensor]:
    rows = max(3, inputs["k"].shape[1] // 2)
    return [*lk.merge_tokens(**inputs, num_groups=rows, backend=backend)]


def merge_indices(backend: str, **inputs: Tensor) -> list[Tensor]:
    return [*lk.merge_tokens(**inputs, backend=backend)]


CALLS = {
    "mean": Call("summarize_blocks", ("k", "seq_lens"), blocks("mean")),
    "minmax": Call("summarize_blocks", ("k", "seq_lens"), blocks("minmax"), exact=True),
    "score": Call("score_tokens", ("q", "k", "seq_lens"), score),
    "score_rotated": Call("score_tokens", ("q", "k", "positions"), score_rotated),
    "redundancy": Call("score_redundancy", ("k", "v", "recent_k", "slots", "seq_lens"), redundancy),
    "novelty": Call("score_novelty", ("k", "usual", "slots", "previous", "seq_lens"), novelty),
    "select": Call("select_tokens", ("scores", "seq_lens"), select, exact=True),
    "compact": Call("compact_tokens", ("k", "v", "indices"), compact, exact=True),
    "compact_heads": Call("compact_tokens", ("k", "v", "head_indices"), compact_heads, exact=True),
    "evict": Call("evict_similar", ("k", "v", "slots"), evict(), exact=True),
    "evict_heads": Call("evict_similar", ("k", "v", "slots"), evict(per_head=True), exact=True),
    "merge_groups": Call("merge_tokens", ("k", "v", "groups", "weights", "seq_lens"), merge_groups),
    "merge_indices": Call("merge_tokens", ("k", "v", "indices", "weights", "seq_lens"), merge_indices),
}
TOKENS = ("q", "k", "v", "recent_k")  # [batch, ..., heads, dim]: what may be any view
IN_PLACE = ("compact_tokens", "evict_similar")

# Every call on every backend of its op.
each_call = pytest.mark.parametrize(
    ("name", "backend", "device"),
    [
        pytest.param(name, *case.values, id=f"{name}-{case.id}", marks=case.marks)
        for name, call in CALLS.items()
        for case in kit.cases(call.op)
    ],
)
