# SPDX-License-Identifier: Apache-2.0
"""Selection of the budget from a full memory, all layers at once, plain and spread over time; and one long row."""

from __future__ import annotations

import torch

import baselines
import kit
from livevlm_kernels import backends, select_tokens
from shapes import models


def make(rows: int, seq_len: int, device: str) -> kit.Inputs:
    """Scores over many orders of magnitude, like attention; no two of a row are equal, so there is one right answer."""
    rank = torch.rand(rows, seq_len, device=device).argsort(-1)
    return {"scores": ((rank + 1) / seq_len) ** 3 / seq_len}


def providers(budget: int, ratio: float, rows: int, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda inputs: select_tokens(inputs["scores"], budget, scatter_ratio=ratio, backend=name)[0]

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    table["eager"] = lambda i: baselines.select_tokens(i["scores"], budget, scatter_ratio=ratio)[0]
    if rows > 1 and ratio == 0:  # what peers do in each layer
        table["eager loop"] = lambda i: torch.cat(
            baselines.each_layer(
                lambda row: baselines.select_tokens(row, budget, scatter_ratio=ratio)[0], [i["scores"]]
            )
        )
    if device == "cuda" and rows == 28:
        compiled = kit.compiled(baselines.select_tokens)
        table["eager compiled"] = lambda i: compiled(i["scores"], budget, scatter_ratio=ratio)[0]
    return table | {name: backend(name) for name in backends("select_tokens", device) if name != "reference"}


def main() -> None:
    options = kit.arguments(__doc__)
    long = 1_000_000 if options.device == "cuda" else 20_000
    with kit.Bench("select_tokens", options.device, options.results) as bench:
        cases = [
            (model.name, model.num_layers, model.full, model.budget, ratio)
            for model in models(options.device)
            for ratio in (0.5, 0.0)
        ]
        for name, rows, seq_len, budget, ratio in [*cases, ("one row", 1, long, 12_000, 0.5)]:
            bench.run(
                f"{name} {rows}x{seq_len} keep {budget} scatter {ratio}",
                torch.float32,
                lambda rows=rows, seq_len=seq_len: make(rows, seq_len, options.device),
                moved=4 * rows * (seq_len + budget + 1),
                providers=providers(budget, ratio, rows, options.device),
            )


if __name__ == "__main__":
    main()
