# SPDX-License-Identifier: Apache-2.0
"""Merging of a clip, all layers at once: one token a frame, plain or weighted, and odd tokens into their nearest even.

Each odd token has an even one that is clearly nearest, so that all roundings agree on the right answer.
"""

from __future__ import annotations

import torch

import baselines
import kit
from livevlm_kernels import backends, merge_tokens
from shapes import DTYPE, Model, models


def tokens_in_pairs(model: Model, num_tokens: int, device: str) -> torch.Tensor:
    """Random keys; each odd token resembles one even token, anywhere in the clip (cosine 0.7, to others about 0)."""
    k = model.kv(num_tokens, device)
    partner = torch.randperm(num_tokens // 2, device=device)
    k[:, 1::2] += k[:, ::2][:, partner]
    return k


def make(model: Model, num_frames: int, kind: str, device: str) -> kit.Inputs:
    tokens = model.clip(num_frames)
    inputs = {"k": tokens_in_pairs(model, tokens, device), "v": model.kv(tokens, device)}
    if kind == "nearest":
        even = torch.arange(0, tokens, 2, dtype=torch.int32, device=device)
        return inputs | {"indices": even.repeat(model.num_layers, 1)}
    frame = torch.arange(tokens, dtype=torch.int32, device=device) // model.tokens_per_frame
    inputs["groups"] = frame.repeat(model.num_layers, 1)
    if kind == "frames weighted":
        inputs["weights"] = torch.rand(model.num_layers, tokens, device=device)
    return inputs


def providers(model: Model, num_frames: int, kind: str, device: str) -> dict[str, kit.Provider]:
    groups = None if kind == "nearest" else num_frames

    def backend(name: str) -> kit.Provider:
        return lambda i: merge_tokens(**i, num_groups=groups, backend=name)

    on_gpu = device == "cuda" and model.name == "7B"
    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    if kind == "nearest":
        table["eager"] = lambda i: baselines.merge_pairs(i["k"], i["v"])
        table["eager loop"] = lambda i: [
            torch.cat(each) for each in zip(*baselines.each_layer(baselines.merge_pairs, [i["k"], i["v"]]), strict=True)
        ]
        table["ToMe" + kit.OTHER_RESULT] = lambda i: baselines.tome(i["k"], i["v"])
        table["kvpress MergingPress" + kit.OTHER_RESULT] = lambda i: baselines.kvpress_merging(i["k"], i["v"])
        if on_gpu:
            pairs = kit.compiled(baselines.merge_pairs)
            table["eager compiled"] = lambda i: pairs(i["k"], i["v"])
    else:
        table["eager"] = lambda i: baselines.merge_frames(i["k"], i["v"], num_frames, i.get("weights"))
        table["eager scatter"] = lambda i: baselines.merge_groups(**i, num_groups=num_frames)
        if on_gpu:
            frames = kit.compiled(baselines.merge_frames)
            table["eager compiled"] = lambda i: frames(i["k"], i["v"], num_frames, i.get("weights"))
    return table | {name: backend(name) for name in backends("merge_tokens", device) if name != "reference"}


def check(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Means in bf16."""
    for mine, other in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-3)


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    cases = [(8, "frames"), (32, "frames"), (32, "frames weighted"), (8, "nearest"), (32, "nearest")]
    with kit.Bench("merge_tokens", device, options.results) as bench:
        for model in models(device):
            for num_frames, kind in cases:
                tokens = model.clip(num_frames)
                out = tokens // 2 if kind == "nearest" else num_frames
                facts = out if kind == "nearest" else tokens * (2 if kind == "frames weighted" else 1)
                bench.run(
                    f"{model.text(tokens)} into {out} {kind}",
                    DTYPE,
                    lambda model=model, num_frames=num_frames, kind=kind: make(model, num_frames, kind, device),
                    moved=2 * model.kv_bytes(tokens + out) + 4 * model.num_layers * (facts + out),
                    providers=providers(model, num_frames, kind, device),
                    check=check,
                )


if __name__ == "__main__":
    main()
