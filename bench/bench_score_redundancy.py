# SPDX-License-Identifier: Apache-2.0
"""Similarity to the recent frames and value norms, all layers at once: clips of 8 and 32 frames, and a full memory."""

from __future__ import annotations

import torch

import baselines
import kit
from livevlm_kernels import backends, score_redundancy
from shapes import DTYPE, Model, models


def arguments(inputs: kit.Inputs, model: Model, recent: int) -> tuple[torch.Tensor, ...]:
    """Keys, values, recent keys (a part of the keys) and slots."""
    past = inputs["k"].shape[1] - model.clip(recent)
    recent_k = inputs["k"][:, past:].unflatten(1, (recent, model.tokens_per_frame))
    return inputs["k"], inputs["v"], recent_k, inputs["slots"]


def providers(model: Model, tokens: int, recent: int, per_head: bool, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda i: score_redundancy(*arguments(i, model, recent), per_head=per_head, backend=name)

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    table["eager"] = lambda i: baselines.score_redundancy(*arguments(i, model, recent), per_head=per_head)
    if not per_head:
        table["eager loop"] = lambda i: [
            torch.cat(each)
            for each in zip(*baselines.each_layer(baselines.score_redundancy, arguments(i, model, recent)), strict=True)
        ]
    if tokens % model.tokens_per_frame == 0:  # the formulas are for whole frames
        name = "InfiniPot-V" if per_head else "InfiniPot-V" + kit.OTHER_RESULT
        table[name] = lambda i: baselines.infinipot_v_scores(i["k"], i["v"], recent, model.tokens_per_frame)
    if device == "cuda" and model.name == "7B" and tokens >= model.clip(32) and not per_head:
        compiled = kit.compiled(baselines.score_redundancy)
        table["eager compiled"] = lambda i: compiled(*arguments(i, model, recent))
    return table | {name: backend(name) for name in backends("score_redundancy", device) if name != "reference"}


def check(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Unit keys in bf16 are good to two digits."""
    for mine, other in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-2)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    with kit.Bench("score_redundancy", device, options.results) as bench:
        for model in models(device):
            whole = model.budget // 4 // model.tokens_per_frame  # recent frames: a quarter of the budget (InfiniPot-V)
            cases = [(model.clip(8), 1, False), (model.clip(32), 4, False), (model.full, whole, False)]
            for tokens, recent, per_head in [*cases, (model.clip(32), 4, True)]:
                heads = model.num_kv_heads if per_head else 1
                bench.run(
                    f"{model.text(tokens)} recent {recent}{' per head' if per_head else ''}",
                    DTYPE,
                    lambda model=model, tokens=tokens: {
                        "k": model.kv(tokens, device),
                        "v": model.kv(tokens, device),
                        "slots": model.slots(tokens, device),
                    },
                    moved=2 * model.kv_bytes(tokens) + 4 * model.num_layers * tokens * (1 + 2 * heads),
                    providers=providers(model, tokens, recent, per_head, device),
                    check=check,
                )


if __name__ == "__main__":
    main()
