# SPDX-License-Identifier: Apache-2.0
"""Joining attention over parts of the keys: what a memory and a clip give, or splits of a long history."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import attention_kit
import attention_peers as peers
import flashinfer_peer
import kit
from livevlm_kernels import backends, merge_states
from shapes import DTYPE, Model, models

CASES = [(2, 64), (8, 32), (2, 6272)]  # parts, queries
SMALL = [(2, 64), (8, 32)]


def make(model: Model, parts: int, queries: int, device: str) -> kit.Inputs:
    shape = (parts, queries, model.num_qo_heads)
    outs = torch.randn(*shape, model.head_dim, device=device, dtype=DTYPE)
    lses = torch.randn(shape, device=device)
    if device == "cpu":
        return {"outs": outs, "lses": lses}
    # FlashInfer wants the parts of a query next to one another, and logarithms to base 2.
    other = {
        "by_query": outs.transpose(0, 1).contiguous(),
        "base_2": (lses.transpose(0, 1) * math.log2(math.e)).contiguous(),
    }
    return attention_kit.PartlyRead({"outs": outs, "lses": lses} | other, hidden=list(other))


def flashinfer_peer_of(device: str) -> dict[str, kit.Provider]:
    module, name = flashinfer_peer.load()
    if module is None or device == "cpu":
        return {}
    return {name: lambda i: (module.merge_states(i["by_query"], i["base_2"])[0], None)}


def providers(device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda inputs: merge_states(inputs["outs"], inputs["lses"], backend=name)

    table = {"reference": backend("reference")}
    table |= {name: backend(name) for name in backends("merge_states", device) if name != "reference"}
    if attention_kit.PEERS:
        table |= flashinfer_peer_of(device)
        table["eager"] = lambda inputs: peers.merge_states(inputs["outs"], inputs["lses"])
        if device == "cuda":
            compiled = kit.compiled(peers.merge_states)
            table["eager compiled"] = lambda inputs: compiled(inputs["outs"], inputs["lses"])
    return table


def check(result: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=1.6e-2, atol=4e-3)
    if result[1] is not None:
        torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-5)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    with kit.Bench("merge_states", device, options.results) as bench:
        for model in models(device)[:1]:
            for parts, queries in CASES if device == "cuda" else SMALL:
                rows = queries * model.num_qo_heads
                moved = (parts + 1) * rows * (DTYPE.itemsize * model.head_dim + 4)
                shape = f"{model.name} {parts}x{queries}x{model.num_qo_heads}x{model.head_dim}"
                if attention_kit.wanted(shape):
                    bench.run(
                        shape, DTYPE, partial(make, model, parts, queries, device), moved, providers(device), check
                    )


if __name__ == "__main__":
    main()
