# SPDX-License-Identifier: Apache-2.0
"""Blocks of keys and values of a 12k-token memory, all layers at once, in fp8 and int4."""

from __future__ import annotations

import torch
from torch import Tensor

import kit
from livevlm_kernels import backends, quantize_blocks
from shapes import DTYPE, models

FORMATS = ("fp8", "int4")


def run(name: str, dtype: str, inputs: kit.Inputs) -> list[Tensor]:
    result = quantize_blocks(inputs["k"], inputs["v"], dtype=dtype, backend=name)
    return [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in result]


def equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def main() -> None:
    options = kit.arguments(__doc__)
    with kit.Bench("quantize_blocks", options.device, options.results) as bench:
        for model in models(options.device):
            tokens = 12288 if options.device == "cuda" else 640
            for block_size in (16, 64):
                shape = (model.num_layers, tokens // block_size, block_size, model.num_kv_heads, model.head_dim)

                def make(shape: tuple[int, ...] = shape) -> kit.Inputs:
                    return {name: torch.randn(shape, device=options.device, dtype=DTYPE) for name in ("k", "v")}

                for dtype in FORMATS:
                    names = ["reference", *(n for n in backends("quantize_blocks", options.device) if n != "reference")]
                    made = quantize_blocks(*make().values(), dtype=dtype)
                    bench.run(
                        f"{model.name} {'x'.join(map(str, shape))} {dtype}",
                        DTYPE,
                        make,
                        2 * torch.Size(shape).numel() * DTYPE.itemsize + sum(x.nbytes for x in made),
                        {n: lambda i, n=n, dtype=dtype: run(n, dtype, i) for n in names},
                        equal,
                    )


if __name__ == "__main__":
    main()
