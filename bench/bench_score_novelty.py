# SPDX-License-Identifier: Apache-2.0
"""Distances to means of patch slots and to earlier tokens, all layers at once: a full memory and a clip of 8 frames.

Bytes are those of all tokens once, slots and previous tokens, and results; means and earlier tokens, which should come
from caches, are not counted. "kept" is the memory as it is in use: tokens of earlier frames were chosen at random, in
every layer others. "frames" is one of whole frames.
"""

from __future__ import annotations

import torch

import baselines
import kit
from livevlm.policies.history import previous_in_slot
from livevlm_kernels import backends, score_novelty
from shapes import DTYPE, Model, models, random_subset

NAMES = ("x", "usual", "slots", "previous")


def inputs(model: Model, tokens: int, kept: bool, device: str) -> kit.Inputs:
    """A memory at which a clip of 8 frames has just arrived. Every token has a `previous`: first ones name others."""
    slots = model.slots(tokens, device)
    if kept:
        seen = 16 * model.budget // model.tokens_per_frame * model.tokens_per_frame
        chosen = random_subset(model.num_layers, seen, tokens - model.clip(8), device)
        slots[:, : chosen.shape[1]] = chosen % model.tokens_per_frame
    usual = torch.randn(model.num_layers, model.tokens_per_frame, model.num_kv_heads, model.head_dim, device=device)
    return {"x": model.kv(tokens, device), "usual": usual, "slots": slots, "previous": previous_in_slot(slots).abs()}


def providers(model: Model, kept: bool, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda i: score_novelty(*(i[each] for each in NAMES), backend=name)

    def eager(i: kit.Inputs) -> tuple[torch.Tensor, ...]:
        return baselines.score_novelty(*(i[each] for each in NAMES))

    table: dict[str, kit.Provider] = {"reference": backend("reference"), "eager": eager}
    if device == "cuda" and model.name == "7B" and kept:
        compiled = kit.compiled(baselines.score_novelty)
        table["eager compiled"] = lambda i: compiled(*(i[each] for each in NAMES))
    return table | {name: backend(name) for name in backends("score_novelty", device) if name != "reference"}


def check(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Sums of squares in another order."""
    for mine, other in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    with kit.Bench("score_novelty", device, options.results) as bench:
        for model in models(device):
            tokens = model.budget + model.clip(8)
            for kept in (True, False):
                bench.run(
                    f"{model.text(tokens)} {'kept' if kept else 'frames'}",
                    DTYPE,
                    lambda model=model, tokens=tokens, kept=kept: inputs(model, tokens, kept, device),
                    moved=model.kv_bytes(tokens) + 4 * model.num_layers * tokens * (2 + 2),
                    providers=providers(model, kept, device),
                    check=check,
                )


if __name__ == "__main__":
    main()
