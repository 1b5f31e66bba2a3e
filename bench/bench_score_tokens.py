# SPDX-License-Identifier: Apache-2.0
"""Attention scores of a clip and of a full memory: 64 queries, with and without RoPE at read.

Two floors: reading the keys once at the speed of a copy (`copy` in the table), and the products on the tensor cores at
the rate of a large bf16 matmul, measured in the same run. The products are counted once (Q K^T), and twice: a softmax
must know a row's sum before the first score, so what does not store all logits computes them again.
"""

from __future__ import annotations

from typing import Any

import torch

import baselines
import kit
from livevlm_kernels import backends, score_tokens
from shapes import DTYPE, Model, models, rope_table

NUM_QUERIES = 64


def make(model: Model, num_tokens: int, rope: bool, device: str) -> kit.Inputs:
    shape = (model.num_layers, NUM_QUERIES, model.num_qo_heads, model.head_dim)
    inputs = {"q": torch.randn(shape, device=device, dtype=DTYPE), "k": model.kv(num_tokens, device)}
    if rope:
        inputs["positions"] = torch.arange(num_tokens, dtype=torch.int32, device=device).repeat(model.num_layers, 1)
        inputs["cos_sin_cache"] = rope_table(num_tokens, model.head_dim, device)
    return inputs


def providers(model: Model, num_tokens: int, rope: bool, reduction: str, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda inputs: score_tokens(**inputs, reduction=reduction, backend=name)

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    table["eager"] = lambda inputs: baselines.score_tokens(**inputs, reduction=reduction)
    if reduction == "layer":
        table["eager loop"] = lambda inputs: torch.cat(
            baselines.each_layer(
                lambda q, k, positions=None: baselines.score_tokens(
                    q, k, positions=positions, cos_sin_cache=inputs.get("cos_sin_cache")
                ),
                [t for name, t in inputs.items() if name != "cos_sin_cache"],
            )
        )
        if not rope:  # its keys are rotated when they are written
            name = "kvpress SnapKV" + kit.OTHER_RESULT
            table[name] = lambda inputs: baselines.kvpress_snapkv(inputs["q"], inputs["k"])
    if device == "cuda" and (model.name, num_tokens, reduction) == ("7B", model.full, "layer"):
        compiled = kit.compiled(baselines.score_tokens)
        table["eager compiled"] = lambda inputs: compiled(**inputs)
    return table | {name: backend(name) for name in backends("score_tokens", device) if name != "reference"}


def main() -> None:
    options = kit.arguments(__doc__)
    matmul = kit.matmul_ceiling(options.device)
    with kit.Bench("score_tokens", options.device, options.results) as bench:
        print(f"  bf16 matmul {matmul:.1f} TFLOP/s")
        for model in models(options.device):
            for num_tokens in (model.clip(32), model.full):
                product = 2 * model.num_layers * model.num_qo_heads * NUM_QUERIES * num_tokens * model.head_dim
                for rope in (False, True):
                    for reduction in ("layer", "shared"):
                        rows = 1 if reduction == "shared" else model.num_layers
                        moved = model.kv_bytes(num_tokens) + 4 * rows * num_tokens
                        if rope:
                            moved += 4 * num_tokens * (model.num_layers + model.head_dim)

                        def columns(us: float, moved: int = moved, product: int = product) -> dict[str, Any]:
                            by_bytes = 100 * moved / us / 1e3 / bench.ceiling
                            once = 100 * product / us / 1e6 / matmul
                            return {
                                "tflops": round(product / us / 1e6, 1),
                                "percent_of_matmul": round(once, 1),
                                "percent_of_matmul_2": round(2 * once, 1),
                                "percent_of_floor": round(max(by_bytes, once), 1),
                                "percent_of_floor_2": round(max(by_bytes, 2 * once), 1),
                                "matmul_tflops": round(matmul, 1),
                            }

                        bench.run(
                            f"{model.text(num_tokens)} {reduction}{' RoPE' if rope else ''}",
                            DTYPE,
                            lambda model=model, n=num_tokens, rope=rope: make(model, n, rope, options.device),
                            moved,
                            providers(model, num_tokens, rope, reduction, options.device),
                            # means of some thousand weights, for which bf16 logits and keys are good enough
                            check=lambda result, expected: torch.testing.assert_close(
                                result, expected, rtol=2e-2, atol=1e-7
                            ),
                            columns=columns,
                        )


if __name__ == "__main__":
    main()
