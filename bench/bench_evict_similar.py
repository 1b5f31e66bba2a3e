# SPDX-License-Identifier: Apache-2.0
"""Similarity-based eviction in one call, all layers at once: clips to half their tokens, a full memory to its budget.

Inputs are restored before each sample: eviction that is repeated on its own result soon finds copies of a few tokens,
nothing to move, and times of its own.
"""

from __future__ import annotations

from typing import Any

import torch

import baselines
import kit
from livevlm_kernels import backends, evict_similar
from shapes import DTYPE, Model, models

Evicted = tuple[Any, ...]  # kept indices, keys, values


def providers(model: Model, tokens: int, budget: int, recent: int, scope: str, device: str) -> dict[str, kit.Provider]:
    frames = {"num_recent_frames": recent, "tokens_per_frame": model.tokens_per_frame}
    shared, per_head = scope == "shared", scope == "per head"

    def backend(name: str) -> kit.Provider:
        def run(i: kit.Inputs) -> Evicted:
            indices, _ = evict_similar(**i, budget=budget, **frames, shared=shared, per_head=per_head, backend=name)
            return indices, i["k"][:, :budget], i["v"][:, :budget]

        return run

    def one(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> Evicted:
        return baselines.evict_similar(k, v, slots, budget, **frames)

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    if not per_head:
        table["eager"] = lambda i: baselines.evict_similar(**i, budget=budget, **frames, shared=shared)
    if scope == "layer":
        table["eager loop"] = lambda i: list(zip(*baselines.each_layer(one, list(i.values())), strict=True))
    if not shared and tokens % model.tokens_per_frame == 0:  # the formulas are for whole frames
        name = "InfiniPot-V" if per_head else "InfiniPot-V" + kit.OTHER_RESULT
        table[name] = lambda i: baselines.infinipot_v_evict(i["k"], i["v"], budget, **frames)
    if device == "cuda" and model.name == "7B" and scope == "layer":
        compiled = kit.compiled(baselines.evict_similar)
        table["eager compiled"] = lambda i: compiled(**i, budget=budget, **frames)
    return table | {name: backend(name) for name in backends("evict_similar", device) if name != "reference"}


def check(result: Evicted, expected: Evicted) -> None:
    """Rounding decides between tokens that score nearly the same: 98 % must be kept by both, with the same content."""
    indices, *written = (torch.cat(each) if isinstance(each, tuple) else each for each in result)
    if indices.dim() == 2:  # one keep-set for all heads
        indices, others = indices[:, None], expected[0][:, None]
        written, rows = [x[:, :, None] for x in written], [x[:, :, None] for x in expected[1:]]
    else:
        others, rows = expected[0], list(expected[1:])
    assert indices.dtype == torch.int32 and indices.shape == others.shape
    for layer in range(indices.shape[0]):
        for head in range(indices.shape[1]):
            mine, other = indices[layer, head], others[layer, head]
            assert bool((mine.diff() > 0).all()), "not sorted"
            common, match = torch.isin(mine, other), torch.isin(other, mine)
            share = common.float().mean().item()
            assert share >= 0.98, f"layer {layer}: {share:.1%} of the kept tokens are those of the reference"
            for x, y in zip(written, rows, strict=True):
                torch.testing.assert_close(x[layer, common, head], y[layer, match, head], rtol=0, atol=0)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    with kit.Bench("evict_similar", device, options.results) as bench:
        for model in models(device):
            whole = model.budget // 4 // model.tokens_per_frame  # recent frames: a quarter of the budget (InfiniPot-V)
            clips = [(model.clip(8), model.clip(4), 1, "layer"), (model.clip(32), model.clip(16), 4, "layer")]
            memory = [(model.full, model.budget, whole, scope) for scope in ("layer", "shared")]
            for tokens, budget, recent, scope in [*clips, *memory, (model.clip(32), model.clip(16), 4, "per head")]:
                sets = 1 if scope == "shared" else model.num_kv_heads if scope == "per head" else model.num_layers
                # all keys and values read, what is kept written, once
                moved = 2 * model.kv_bytes(tokens + budget) + 4 * (model.num_layers * tokens + sets * budget)
                twice = moved + 2 * model.kv_bytes(budget)  # what is kept is read again: see docs/kernels.md
                bench.run(
                    f"{model.text(tokens)} keep {budget} {scope}",
                    DTYPE,
                    lambda model=model, tokens=tokens: {
                        "k": model.kv(tokens, device),
                        "v": model.kv(tokens, device),
                        "slots": model.slots(tokens, device),
                    },
                    moved=moved,
                    providers=providers(model, tokens, budget, recent, scope, device),
                    check=check,
                    in_place=True,
                    columns=lambda us, twice=twice: {
                        "percent_of_copy_kept_read_twice": round(100 * twice / us / 1e3 / bench.ceiling, 1)
                    },
                )


if __name__ == "__main__":
    main()
