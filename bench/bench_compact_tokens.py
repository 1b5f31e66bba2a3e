# SPDX-License-Identifier: Apache-2.0
"""Moving kept tokens to the front, all layers at once: keys, values, and the five facts a stream knows of each token.

Eager PyTorch writes new tensors, which takes less traffic than updating the memory in place; the time it takes to copy
them back is a row of its own.
"""

from __future__ import annotations

from typing import Any

import torch

import baselines
import kit
from livevlm_kernels import backends, compact_tokens
from shapes import DTYPE, Model, models, random_subset

FACTS = {  # of each token, as in livevlm's memory
    "position": torch.int32,
    "frame": torch.int32,
    "slot": torch.int32,
    "time": torch.float64,
    "size": torch.float32,
}


def make(model: Model, tokens: int, kept: int, per_head: bool, device: str) -> kit.Inputs:
    inputs = {"k": model.kv(tokens, device), "v": model.kv(tokens, device)}
    if per_head:
        indices = random_subset(model.num_layers * model.num_kv_heads, tokens, kept, device)
        return inputs | {"indices": indices.unflatten(0, (model.num_layers, -1))}
    for name, dtype in FACTS.items():
        inputs[name] = torch.arange(tokens, device=device).to(dtype).repeat(model.num_layers, 1)
    return inputs | {"indices": random_subset(model.num_layers, tokens, kept, device)}


def split(inputs: kit.Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [t for name, t in inputs.items() if name != "indices"], inputs["indices"]


def providers(model: Model, tokens: int, per_head: bool, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        def run(inputs: kit.Inputs) -> list[torch.Tensor]:
            tensors, indices = split(inputs)
            compact_tokens(tensors, indices, per_head=per_head, backend=name)
            return [t[:, : indices.shape[-1]] for t in tensors]

        return run

    def loop(inputs: kit.Inputs) -> list[Any]:
        tensors, indices = split(inputs)
        rows = range(indices.shape[0])
        return [[t[layer].index_select(0, indices[layer]) for layer in rows] for t in tensors]

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    table["eager"] = lambda inputs: baselines.compact_tokens(*split(inputs), per_head=per_head)
    if not per_head:
        table["eager, copied back"] = lambda inputs: baselines.compact_in_place(*split(inputs))
        table["eager loop"] = loop
        if device == "cuda" and model.name == "7B" and tokens == model.full:
            compiled = kit.compiled(baselines.compact_tokens)
            table["eager compiled"] = lambda inputs: compiled(*split(inputs))
    return table | {name: backend(name) for name in backends("compact_tokens", device) if name != "reference"}


def check(result: list[Any], expected: list[torch.Tensor]) -> None:
    for mine, other in zip(result, expected, strict=True):
        rows = torch.stack(mine) if isinstance(mine, list) else mine
        torch.testing.assert_close(rows, other, rtol=0, atol=0)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    facts = sum(dtype.itemsize for dtype in FACTS.values())
    with kit.Bench("compact_tokens", device, options.results) as bench:
        for model in models(device):
            half = [(model.clip(frames), model.clip(frames) // 2, False) for frames in (8, 32)]
            per_head = (model.clip(32), model.clip(32) // 2, True)
            for tokens, kept, heads in [*half, (model.full, model.budget, False), per_head]:
                each = 2 * model.kv_bytes(kept) + (0 if heads else facts * model.num_layers * kept)
                indices = 4 * model.num_layers * kept * (model.num_kv_heads if heads else 1)
                bench.run(
                    f"{model.text(tokens)} keep {kept}{' per head, no facts' if heads else ''}",
                    DTYPE,
                    lambda model=model, tokens=tokens, kept=kept, heads=heads: make(model, tokens, kept, heads, device),
                    moved=2 * each + indices,
                    providers=providers(model, tokens, heads, device),
                    check=check,
                    in_place=True,
                )


if __name__ == "__main__":
    main()
