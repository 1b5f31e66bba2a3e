# SPDX-License-Identifier: Apache-2.0
"""Block representatives of a 12k-token memory, all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

import kit
from livevlm_kernels import backends, summarize_blocks

# name: layers, tokens, KV heads, head_dim of the language model, with the default budget
MODELS = {"7B": (28, 12288, 4, 128), "0.5B": (24, 12288, 2, 64)}
SMALL = {"0.5B": (4, 1568, 2, 64)}  # for a CPU
CASES = [(16, "mean"), (64, "mean"), (196, "mean"), (16, "minmax")]


def by_hand(k: Tensor, block_size: int) -> Tensor:
    """What one would write without this op; it cannot do ragged sequences or a last block that is not full."""
    return k.unflatten(1, (-1, block_size)).mean(2, dtype=torch.float32)


def providers(shape: tuple[int, ...], block_size: int, kind: str, device: str) -> dict[str, kit.Provider]:
    def backend(name: str) -> kit.Provider:
        return lambda inputs: summarize_blocks(inputs["k"], block_size=block_size, kind=kind, backend=name)

    table: dict[str, kit.Provider] = {"reference": backend("reference")}
    if device == "cuda":
        torch._dynamo.reset()
        table["reference compiled"] = torch.compile(backend("reference"))
    if kind == "mean" and shape[1] % block_size == 0:
        table["by hand"] = lambda inputs: by_hand(inputs["k"], block_size)
        if device == "cuda":
            compiled = torch.compile(by_hand, dynamic=False)
            table["by hand compiled"] = lambda inputs: compiled(inputs["k"], block_size)
    table |= {name: backend(name) for name in backends("summarize_blocks", device) if name != "reference"}
    return table


def main() -> None:
    options = kit.arguments(__doc__)
    bench = kit.Bench("summarize_blocks", options.device, options.results)
    for model, shape in (MODELS if options.device == "cuda" else SMALL).items():
        for block_size, kind in CASES:
            num_blocks = -(-shape[1] // block_size)
            out = shape[0] * num_blocks * shape[2] * shape[3] * (2 if kind == "minmax" else 1)
            bench.run(
                f"{model} {'x'.join(map(str, shape))} block {block_size} {kind}",
                torch.bfloat16,
                lambda shape=shape: {"k": torch.randn(shape, device=options.device, dtype=torch.bfloat16)},
                moved=2 * torch.Size(shape).numel() + 4 * out,
                providers=providers(shape, block_size, kind, options.device),
                check=lambda result, expected: torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5),
            )


if __name__ == "__main__":
    main()
