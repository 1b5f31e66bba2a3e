# SPDX-License-Identifier: Apache-2.0
"""Decoding over blocks in bf16, fp8 and int4 at equal tokens: time, bytes, and what rounding the blocks costs.

Counted as moved: the pool with its scales, queries and output. Column vs_bf16: how many times as fast as the same
kernel over bf16. Column pool_mb: bytes of the pool. Column error: of the output, relative, against attention in float32
over what was quantised. Keys are random, but channels differ as those of un-rotated keys do: each has its own
deviation, and one in sixteen a mean of several deviations. Values are random numbers of one distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attention_kit
import kit
from bench_block_attention import Case
from livevlm_kernels import backends, block_attention, quantize_blocks
from shapes import DTYPE, models, rope_table

FORMATS = ("bf16", "fp8", "int4")


def cases(device: str) -> list[Case]:
    large, *others = models(device)
    if device == "cpu":
        return [Case(large, 1, 384, 16, 2)]
    result = [Case(large, 1, n, size, batch) for size in (16, 64) for n in (5120, 12288) for batch in (1, 8, 64)]
    result += [Case(small, 1, 12288, 16, 8) for small in others]
    return [*result, Case(large, 32, 12288), Case(large, 1568, 12288 + 1568)]


def realistic(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Keys and values in bf16."""
    shape = (case.batch * case.blocks, case.block_size, case.model.num_kv_heads, case.model.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    own = {"device": device, "generator": generator}
    deviation = torch.rand(shape[2:], **own) + 0.5
    mean = torch.where(torch.rand(shape[2:], **own) < 1 / 16, torch.randn(shape[2:], **own) * 6, 0.0)
    k = torch.randn(shape, device=device, dtype=DTYPE) * deviation.to(DTYPE) + mean.to(DTYPE)
    return k, torch.randn(shape, device=device, dtype=DTYPE)


def make(case: Case, form: str, table: Tensor, device: str, exact: bool = False) -> kit.Inputs:
    inputs = case.make(table, device)
    k, v = realistic(case, device)
    inputs |= {"k": k, "v": v} if form == "bf16" else quantize_blocks(k, v, dtype=form)._asdict()
    return inputs | ({"exact_k": k, "exact_v": v} if exact else {})


def run(name: str, rope: Tensor | None, i: kit.Inputs) -> Tensor:
    options: dict[str, Any] = {key: i[key] for key in ("k_scale", "v_scale") if key in i}
    if rope is not None:
        options |= {"positions": i["positions"], "q_positions": i["q_positions"], "cos_sin_cache": rope}
    out = block_attention(i["q"], i["k"], i["v"], i["block_table"], i["seq_lens"], **options, backend=name)
    assert isinstance(out, Tensor)
    return out


def error_of(case: Case, name: str, form: str, table: Tensor, rope: Tensor | None, device: str) -> float:
    """Of an output, relative to attention in float32 over the keys and values that were rounded."""
    inputs = make(case, form, table, device, exact=True)
    exact = {key: x for key, x in inputs.items() if key not in ("k_scale", "v_scale")}
    exact |= {"q": inputs["q"].float(), "k": inputs["exact_k"].float(), "v": inputs["exact_v"].float()}
    expected, result = run("reference", rope, exact), run(name, rope, inputs)
    return ((result.float() - expected).norm() / expected.norm()).item()


def measure(bench: kit.Bench, case: Case) -> None:
    device, table = bench.device, case.block_table().to(bench.device)
    table_f32 = rope_table(case.keys, case.model.head_dim, device)
    best = backends("block_attention", device)[0]
    few = case.batch * case.queries <= 64  # the reference takes every case's time, else
    for title, rope in (("", None), (", RoPE, float16 table", table_f32.half()), (", RoPE, float32 table", table_f32)):
        of_bf16: list[float] = []
        for form in FORMATS:
            like = make(case, form, table, device)
            pool = sum(like[key].nbytes for key in ("k", "v", "k_scale", "v_scale") if key in like)
            error = round(error_of(case, best, form, table, rope, device), 5) if few else ""
            columns = {"pool_mb": round(pool / 1e6, 2), "error": error}

            def with_ratio(
                us: float, columns: dict[str, Any] = columns, of_bf16: list[float] = of_bf16
            ) -> dict[str, Any]:
                of_bf16.append(us)
                return columns | {"vs_bf16": round(of_bf16[0] / us, 2)}

            rows = bench.run(
                case.shape,
                DTYPE,
                lambda form=form: make(case, form, table, device),
                pool + 2 * like["q"].nbytes,
                {f"{best}, {form}{title}": lambda i, rope=rope: run(best, rope, i)},
                attention_kit.close,
                columns=with_ratio,
            )
            if not rows:
                return


def main() -> None:
    options = kit.arguments(__doc__)
    with kit.Bench("quantized_attention", options.device, options.results) as bench:
        for case in cases(options.device):
            if attention_kit.wanted(case.shape):
                measure(bench, case)


if __name__ == "__main__":
    main()
