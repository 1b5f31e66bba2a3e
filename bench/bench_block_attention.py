# SPDX-License-Identifier: Apache-2.0
"""Attention over blocks of the memory, one layer: decoding, questions of 32 tokens, clips that arrive.

Counted as moved: keys and values of the selected tokens once, queries and output. Tables of blocks, positions and the
RoPE table (column rope_table_mb, in float32; half of that in float16) are not. Rows with RoPE read un-rotated keys and
queries; all other rows, peers included, take the same numbers as rotated ones. The RoPE table is one for all sets of
inputs, as it is one for all layers, so part of it stays in L2. Blocks of a sequence lie in random order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import attention_kit
import attention_peers as peers
import flashinfer_peer
import kit
from livevlm_kernels import backends, block_attention
from shapes import DTYPE, Model, models, rope_table


@dataclass(frozen=True)
class Case:
    model: Model
    queries: int  # of each sequence; the last tokens among its keys
    keys: int
    block_size: int = 16
    batch: int = 1
    every_peer: bool = False  # also those that compile for a long time, and calls without a graph

    @property
    def shape(self) -> str:
        kind = "decode" if self.queries == 1 else "question" if self.queries < 64 else "clip"
        heads = f"{self.model.num_qo_heads}/{self.model.num_kv_heads}x{self.model.head_dim}"
        size = f"{self.queries}x{self.keys} block {self.block_size} batch {self.batch}"
        return f"{self.model.name} {heads} {kind} {size}"

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block_size)

    @property
    def moved(self) -> int:
        model = self.model
        kv, q = 2 * self.keys * model.num_kv_heads, 2 * self.queries * model.num_qo_heads
        return DTYPE.itemsize * self.batch * model.head_dim * (kv + q)

    @property
    def flops(self) -> int:
        pairs = attention_kit.visible_pairs(self.queries, self.keys)
        return 4 * self.batch * self.model.num_qo_heads * self.model.head_dim * pairs

    def block_table(self) -> Tensor:
        """Each sequence's own region of the pool; random but for the blocks that hold its queries."""
        old = (self.keys - self.queries) // self.block_size
        rows = [torch.cat((torch.randperm(old), torch.arange(old, self.blocks))) for _ in range(self.batch)]
        return torch.stack([row + number * self.blocks for number, row in enumerate(rows)]).int()

    def make(self, table: Tensor, device: str) -> kit.Inputs:
        model, pool = self.model, (self.batch * self.blocks, self.block_size)
        k, v = (torch.randn(*pool, model.num_kv_heads, model.head_dim, device=device, dtype=DTYPE) for _ in range(2))
        q = torch.randn(self.batch * self.queries, model.num_qo_heads, model.head_dim, device=device, dtype=DTYPE)
        slots = torch.arange(self.blocks * self.block_size, dtype=torch.int32, device=device)
        positions = torch.empty(pool, dtype=torch.int32, device=device)
        positions[table.long()] = slots.view(self.blocks, -1)
        own = torch.arange(self.keys - self.queries, self.keys, dtype=torch.int32, device=device)
        return {
            "q": q,
            "k": k,
            "v": v,
            "block_table": table.clone(),
            "seq_lens": torch.full((self.batch,), self.keys, dtype=torch.int32, device=device),
            "positions": positions,
            "q_positions": own.repeat(self.batch),
        }


def cases(device: str) -> list[Case]:
    large, *others = models(device)
    if device == "cpu":
        return [Case(large, 1, 384, 16, 2), Case(large, 16, 384, every_peer=True), Case(large, 64, 320)]
    lengths, batches = (2048, 5120, 12288), (1, 8, 64)
    result = [Case(large, 1, n, 16, b, every_peer=n == 5120) for n in lengths for b in batches]
    result += [Case(large, 1, n, 64, b) for n in lengths for b in batches]
    result += [Case(small, 1, n, 16, b) for small in others for n in lengths for b in batches[:2]]
    result += [Case(large, 32, n, every_peer=n == 5120) for n in (5120, 12288)]
    result += [Case(small, 32, 12288) for small in others]
    return [*result, *(Case(large, n, 12288 + n) for n in (196, 1568, 6272))]


# ---------------------------------------------------------------- providers
def ours(name: str, rope: Tensor | None) -> kit.Provider:
    """With RoPE or without, each under its name: they give different results."""

    def run(i: kit.Inputs) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if rope is not None:
            options = {"positions": i["positions"], "q_positions": i["q_positions"], "cos_sin_cache": rope}
        out = block_attention(i["q"], i["k"], i["v"], i["block_table"], i["seq_lens"], **options, backend=name)
        return {"rotated before" if rope is None else "RoPE": out}

    return run


def plain(function: flashinfer_peer.Run) -> kit.Provider:
    return lambda i: {"rotated before": function(i["q"], i["k"], i["v"])}


def torch_peers(case: Case, device: str) -> dict[str, kit.Provider]:
    clip = case.queries >= 64
    table: dict[str, kit.Provider] = {}
    if case.block_size != 16:
        return table  # a gather of other blocks makes no difference, nor does it to dense attention
    name = "SDPA flash" if clip else "SDPA"
    table[f"dense {name}"] = plain(lambda q, k, v: peers.dense_sdpa(q, k, v, case.batch))
    table[f"gather + {name}"] = lambda i: {
        "rotated before": peers.gather_sdpa(i["q"], i["k"], i["v"], i["block_table"])
    }
    if device == "cpu":
        return table
    if clip:
        mask = peers.causal_mask(case.queries, case.keys, DTYPE, device)
        for repeat, how in ((False, "enable_gqa"), (True, "K/V repeated")):
            table[f"dense SDPA cuDNN, mask, {how}"] = plain(partial(peers.cudnn_sdpa, mask=mask, repeat=repeat))
    if case.every_peer and case.batch == 1:
        gather = kit.compiled(peers.gather_sdpa)
        table["gather + SDPA compiled"] = lambda i: {"rotated before": gather(i["q"], i["k"], i["v"], i["block_table"])}
        blocks = peers.flex_mask(case.queries, case.keys, device)
        attention = torch.compile(flex_attention, dynamic=False)
        table["FlexAttention, blocks of 128"] = plain(lambda q, k, v: peers.flex(q, k, v, blocks, attention))
    return table


def flashinfer_peers(case: Case, table: Tensor, device: str) -> dict[str, tuple[flashinfer_peer.Plan, kit.Provider]]:
    """Each with its plan, which is made here once; none of them if FlashInfer isn't installed, or cannot do it."""
    module, name = flashinfer_peer.load()
    if module is None or device == "cpu":
        return {}
    like = case.make(table, device)
    found = {}
    # FA3 with heads of 64 would be one more module to compile, for minutes.
    prefill = ["fa2", "fa3"] if case.model.head_dim == 128 else ["fa2"]
    for backend in ["decode"] if case.queries == 1 else prefill:
        try:
            if backend == "decode":
                plan, run = flashinfer_peer.decode(like["q"], like["k"], table, case.keys)
            else:
                fixed = case.queries < 64
                plan, run = flashinfer_peer.prefill(like["q"], like["k"], table, case.keys, backend, fixed_grid=fixed)
            plan()
            found[f"{name} {backend}"] = plan, plain(run)
        except Exception as error:  # its compiler, say
            print(f"  {case.shape:<50} {'':<9} {name} {backend:<19} n/a: {' '.join(str(error).split())[:160]}")
    return found


# ---------------------------------------------------------------- measuring
def measure(bench: kit.Bench, case: Case, matmul: float) -> None:
    device = bench.device
    table, rope = case.block_table().to(device), rope_table(case.keys, case.model.head_dim, device)

    def expected(i: kit.Inputs) -> dict[str, Any]:
        return ours("reference", None)(i) | ours("reference", rope)(i)

    planned = flashinfer_peers(case, table, device) if attention_kit.PEERS else {}
    providers: dict[str, kit.Provider] = {"expected": attention_kit.checked_only(expected)}
    for name in backends("block_attention", device):
        if name != "reference" or device == "cpu":
            providers[name] = ours(name, None)
            providers[f"{name}, RoPE, float32 table"] = ours(name, rope)
            providers[f"{name}, RoPE, float16 table"] = ours(name, rope.half())
    providers |= {name: run for name, (_, run) in planned.items()}
    if attention_kit.PEERS:
        providers |= torch_peers(case, device)

    def columns(us: float) -> dict[str, Any]:
        counted = {"kv_mb": round(case.moved / 1e6, 2), "rope_table_mb": round(rope.nbytes / 1e6, 2)}
        tflops = case.flops / us / 1e6
        return counted | {"tflops": round(tflops, 1), "percent_of_matmul": round(100 * tflops / matmul, 1)}

    rows = bench.run(
        case.shape,
        DTYPE,
        partial(case.make, table, device),
        case.moved,
        providers,
        attention_kit.close_by_name,
        columns=columns,
    )
    timed = {row.provider for row in rows}
    plans = {name: attention_kit.from_python([plan], device) for name, (plan, _) in planned.items()}
    plans = {f"{name}, plan on the host": times for name, times in plans.items()}
    attention_kit.record(bench, case.shape, 0, plans, rows)
    if case.every_peer:
        together = {f"{name} with plan": with_plan(plan, run) for name, (plan, run) in planned.items()}
        called = {name: run for name, run in providers.items() if name in timed} | together
        make = partial(case.make, table, device)
        attention_kit.called_from_python(bench, case.shape, make, case.moved, called, rows)


def with_plan(plan: flashinfer_peer.Plan, run: kit.Provider) -> kit.Provider:
    def both(inputs: kit.Inputs) -> object:
        plan()
        return run(inputs)

    return both


def main() -> None:
    options = kit.arguments(__doc__)
    module, name = flashinfer_peer.load()
    if attention_kit.PEERS:
        print(name if module else f"{name}; its rows are left out")
    with kit.Bench("block_attention", options.device, options.results) as bench:
        matmul = kit.matmul_ceiling(options.device)
        print(f"  matmul {matmul:.0f} TFLOP/s")
        for case in cases(options.device):
            if attention_kit.wanted(case.shape):
                measure(bench, case, matmul)


if __name__ == "__main__":
    main()
