# SPDX-License-Identifier: Apache-2.0
"""Which blocks a question needs, of each kind; and, of one layer, retrieval followed by attention over what it found.

Retrieval moves summaries (float32), or for "mass" all keys, once, and writes a table. With attention: the summaries,
keys and values of the selected blocks once; "RoPE" rows read un-rotated keys, and a float16 table that is not counted.
All score in float32, peers too, so that they find the same blocks; only "mass" takes logits from bf16 keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attention_kit
import attention_peers as peers
import kit
from livevlm_kernels import backends, block_attention, retrieve_blocks
from shapes import DTYPE, Model, models, rope_table


@dataclass(frozen=True)
class Case:
    model: Model
    tokens: int
    block_size: int
    selected: int  # blocks
    queries: int = 1
    kind: str = "mean"
    pooling: str = "query"
    per_head: bool = False
    layers: int = 1

    @property
    def blocks(self) -> int:
        return self.tokens // self.block_size

    @property
    def size(self) -> str:
        return f"{self.queries} of {self.tokens} block {self.block_size} keep {self.selected}"

    @property
    def shape(self) -> str:
        pooling = "" if self.kind == "mass" else f" {self.pooling}"
        more = " per head" if self.per_head else f" {self.layers} layers" if self.layers > 1 else ""
        return f"{self.model.name} {self.kind}{pooling} {self.size}{more}"

    @property
    def row(self) -> int:
        """Elements of a token's key, all KV heads."""
        return self.model.num_kv_heads * self.model.head_dim

    @property
    def scored(self) -> int:
        """Bytes of what is scored, in one layer."""
        if self.kind == "mass":
            return DTYPE.itemsize * self.tokens * self.row
        return 4 * self.blocks * self.row * (2 if self.kind == "minmax" else 1)

    def make(self, device: str) -> kit.Inputs:
        model, heads = self.model, (self.model.num_kv_heads, self.model.head_dim)
        q = torch.randn(self.layers, self.queries, model.num_qo_heads, model.head_dim, device=device).to(DTYPE)
        if self.kind == "mass":
            return {"q": q, "keys": torch.randn(self.layers, self.tokens, *heads, device=device, dtype=DTYPE)}
        if self.kind == "mean":
            return {"q": q, "keys": torch.randn(self.layers, self.blocks, *heads, device=device)}
        bounds = torch.randn(self.layers, self.blocks, 2, *heads, device=device)
        return {"q": q, "keys": bounds.sort(2).values}

    def make_with_pool(self, device: str) -> kit.Inputs:
        """One layer: its summaries don't belong to its keys, which makes no difference to the time."""
        pool = (self.blocks, self.block_size, self.model.num_kv_heads, self.model.head_dim)
        inputs = {name: tensor[0] for name, tensor in self.make(device).items()}
        inputs["k"], inputs["v"] = (torch.randn(pool, device=device, dtype=DTYPE) for _ in range(2))
        return attention_kit.PartlyRead(inputs, hidden=("k", "v"))


def cases(device: str) -> list[Case]:
    model = models(device)[0]
    if device == "cpu":
        kinds = [
            ("mean", "query"),
            ("mean", "softmax"),
            ("minmax", "query"),
            ("minmax", "softmax"),
            ("mass", "softmax"),
        ]
        return [Case(model, 640, 16, 16, 8, kind, pooling) for kind, pooling in kinds]
    memory = partial(Case, model, 12288, 16, math.ceil(0.4 * 768))
    history = partial(Case, model, 12544 * 64, 64, 64)
    return [
        memory(1),
        memory(32),
        memory(32, layers=28),
        memory(32, per_head=True),
        memory(1, pooling="softmax"),
        memory(32, pooling="softmax"),
        memory(32, "minmax"),
        memory(32, "minmax", "softmax"),
        memory(1, "mass", "softmax"),
        memory(32, "mass", "softmax"),
        history(1),
        history(32),
        history(32, pooling="softmax"),
    ]


def with_attention(device: str) -> list[Case]:
    model = models(device)[0]
    if device == "cpu":
        return [Case(model, 640, 16, 16, queries) for queries in (1, 8)]
    memory = [Case(model, 12288, 16, math.ceil(0.4 * 768), queries) for queries in (1, 32)]
    return memory + [Case(model, 12544 * 64, 64, 64, queries) for queries in (1, 32)]


# ---------------------------------------------------------------- retrieval alone
def ours(case: Case, name: str) -> kit.Provider:
    return lambda i: retrieve_blocks(
        i["q"],
        i["keys"],
        num_selected=case.selected,
        kind=case.kind,
        pooling=case.pooling,
        block_size=case.block_size if case.kind == "mass" else None,
        per_head=case.per_head,
        backend=name,
    )[0]


def by_hand(case: Case, function: Callable[..., Tensor]) -> kit.Provider:
    return lambda i: function(i["q"], i["keys"], case.selected, case.kind, case.pooling, case.per_head, case.block_size)


def same_blocks(table: Tensor, expected: Tensor, least: float = 0.98) -> float:
    """Sorted, and almost all the same: rounding decides between blocks that score nearly the same."""
    assert table.dtype == torch.int32 and table.shape == expected.shape
    assert bool((table.diff() > 0).all()), "not sorted"
    rows = zip(table.flatten(0, -2), expected.flatten(0, -2), strict=True)
    share = min(torch.isin(mine, other).float().mean().item() for mine, other in rows)
    assert share >= least, f"{share:.1%} of the blocks are those of the reference"
    return share


def measure(bench: kit.Bench, case: Case) -> None:
    device = bench.device
    providers = {"reference": ours(case, "reference")}
    providers |= {name: ours(case, name) for name in backends("retrieve_blocks", device) if name != "reference"}
    if attention_kit.PEERS:
        providers["eager"] = by_hand(case, peers.retrieve)
        if device == "cuda" and case.queries > 1 and case.layers == 1 and case.pooling == "query":
            providers["eager compiled"] = by_hand(case, kit.compiled(peers.retrieve))
    rows = case.layers * (case.model.num_kv_heads if case.per_head else 1)
    q = DTYPE.itemsize * case.queries * case.model.num_qo_heads * case.model.head_dim
    moved = case.layers * (case.scored + q) + 4 * rows * case.selected
    least = 0.95 if case.kind == "mass" else 0.98  # eager mass has bf16 logits
    check: Any = partial(same_blocks, least=least)
    bench.run(case.shape, DTYPE, partial(case.make, device), moved, providers, check)


# ---------------------------------------------------------------- followed by attention
def ours_with_attention(case: Case, name: str, rope: Tensor | None) -> kit.Provider:
    """Selected blocks are all full, so their keys are counted beforehand; all queries see all of them."""

    def run(i: kit.Inputs) -> dict[str, tuple[Any, Tensor]]:
        table, _ = retrieve_blocks(i["q"], i["keys"], num_selected=case.selected, backend=name)
        options: dict[str, Any] = {}
        if rope is not None:  # positions: as if only what was retrieved had ever been there
            options = {"packed": True, "cos_sin_cache": rope, "q_positions": i["q_positions"]}
        out = block_attention(i["q"], i["k"], i["v"], table[None], i["seq_lens"], causal=False, **options, backend=name)
        return {"rotated before" if rope is None else "RoPE": (out, table)}

    return run


def check_with_attention(result: dict[str, tuple[Tensor, Tensor]], expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Attention exactly where the blocks are the same; one other block of 64 makes 18 % of difference."""
    for name, (out, table) in result.items():
        right, blocks = expected[name]
        if same_blocks(table[None], blocks[None]) == 1:
            attention_kit.close(out, right)
        else:
            error = ((out.float() - right.float()).norm() / right.float().norm()).item()
            assert error <= 0.3, f"relative error {error:.2f}"


def measure_with_attention(bench: kit.Bench, case: Case) -> None:
    device, keys = bench.device, case.selected * case.block_size
    rope = rope_table(keys + case.queries, case.model.head_dim, device).half()

    def make() -> kit.Inputs:
        inputs = case.make_with_pool(device)
        inputs["seq_lens"] = torch.full((1,), keys, dtype=torch.int32, device=device)
        inputs["q_positions"] = torch.arange(keys, keys + case.queries, dtype=torch.int32, device=device)
        return inputs

    def expected(i: kit.Inputs) -> Any:
        return ours_with_attention(case, "reference", None)(i) | ours_with_attention(case, "reference", rope)(i)

    providers: dict[str, kit.Provider] = {"expected": attention_kit.checked_only(expected)}
    able = [backends(op, device) for op in ("retrieve_blocks", "block_attention")]
    for name in able[0]:
        if name in able[1] and (name != "reference" or device == "cpu"):
            providers[name] = ours_with_attention(case, name, None)
            providers[f"{name}, RoPE, float16 table"] = ours_with_attention(case, name, rope)

    def eager(function: Callable[..., Any]) -> kit.Provider:
        return lambda i: {"rotated before": function(i["q"], i["keys"], i["k"], i["v"], case.selected)}

    if attention_kit.PEERS:
        providers["mean, topk, gather, SDPA"] = eager(peers.retrieve_and_attend)
        if device == "cuda" and case.blocks < 1000:
            providers["mean, topk, gather, SDPA compiled"] = eager(kit.compiled(peers.retrieve_and_attend))
        all_of_it = "dense SDPA over all" + kit.OTHER_RESULT
        providers[all_of_it] = lambda i: peers.dense_sdpa(i["q"], i["k"], i["v"], 1)
    q = 2 * DTYPE.itemsize * case.queries * case.model.num_qo_heads * case.model.head_dim
    moved = case.scored + 2 * DTYPE.itemsize * keys * case.row + q + 4 * case.selected
    shape = f"{case.model.name} with attention {case.size}"
    rows = bench.run(shape, DTYPE, make, moved, providers, check_with_attention)
    timed = {row.provider for row in rows if not row.provider.endswith(kit.OTHER_RESULT)}
    called = {name: run for name, run in providers.items() if name in timed}
    attention_kit.called_from_python(bench, shape, make, moved, called, rows)


def main() -> None:
    options = kit.arguments(__doc__)
    with kit.Bench("retrieve_blocks", options.device, options.results) as bench:
        for case in cases(options.device):
            if attention_kit.wanted(case.shape):
                measure(bench, case)
        for case in with_attention(options.device):
            if attention_kit.wanted(f"{case.model.name} with attention {case.size}"):
                measure_with_attention(bench, case)


if __name__ == "__main__":
    main()
