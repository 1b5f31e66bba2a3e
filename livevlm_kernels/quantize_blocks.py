# SPDX-License-Identifier: Apache-2.0
"""Blocks of keys and values in 8 or 4 bits, for parts of the memory that are seldom read."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.quantize_blocks import quantize_blocks as _reference

FORMATS = ("fp8", "int4")


class QuantizedBlocks(NamedTuple):
    """What `block_attention` reads in place of `k` and `v`."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor


def quantize_blocks(
    k: Tensor,
    v: Tensor,
    *,
    dtype: str,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> QuantizedBlocks:
    """Rounds blocks of keys and values to 8 or 4 bits an element.

    "fp8" has elements in e4m3 and a scale for each block and head. "int4" is asymmetric, with a scale and a minimum for
    each channel of a block's keys and for each token's values, as in KIVI (arXiv 2402.02750): channels of keys that are
    large in every token do not spoil the others, as long as keys are un-rotated. Blocks need not be full, but each is
    rounded as a whole: quantise a block when nothing will be added to it.

    Args:
        k: keys, un-rotated, `[*, num_blocks, block_size, num_kv_heads, head_dim]`, float32, float16 or bfloat16, any
            strides. Leading dimensions are layers and streams, all served by one launch; they must collapse without a
            copy. For "int4" head_dim must be even.
        v: values, shape and dtype of `k`.
        dtype: "fp8" or "int4".
        positions: `[*, num_blocks, block_size]`, or `[num_blocks, block_size]` for all leading dimensions alike, int32
            or int64: a slot with a negative position is empty. What lies in it, NaN included, changes nothing; its
            codes are zeros, and so are the pairs of its values. None: all slots are in use.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(k, v, k_scale, v_scale)`. "fp8": k and v float8_e4m3fn in the shape of `k`; scales float32
        `[*, num_blocks, num_kv_heads]`, the largest magnitude / 448. An element is its code times the scale. "int4": k
        and v uint8 `[*, num_blocks, block_size, num_kv_heads, head_dim / 2]`, byte i holds channel i in its low and
        channel i + head_dim / 2 in its high four bits; pairs (scale, minimum) in float16, `k_scale`
        `[*, num_blocks, num_kv_heads, 2, head_dim]` and `v_scale` `[*, num_blocks, block_size, num_kv_heads, 2]`. An
        element is its code times the scale, plus the minimum. Codes are rounded to nearest even, with the scales that
        are returned. A NaN or infinity, or for "int4" more than float16 holds, makes scales that are no numbers, and so
        NaN of all that share them; codes are numbers always. All backends return the same bits.

    Raises:
        ArgumentError: a shape, dtype, device, stride or value is not allowed.
        BackendError: the backend asked for is not available.
    """
    attention.tokens("k", k, min_ndim=4)
    attention.like("v", v, "k", k, k.shape, "[*, num_blocks, block_size, num_kv_heads, head_dim]")
    check.choice("dtype", dtype, FORMATS)
    lead, (num_blocks, block_size, _, head_dim) = k.shape[:-4], k.shape[-4:]
    if dtype == "int4" and head_dim % 2:
        raise ArgumentError(f"head_dim={head_dim} must be even for dtype='int4': two elements share a byte")
    batch = math.prod(lead)
    if positions is not None:
        check.tensor("positions", positions)
        check.dtype("positions", positions, check.INTS)
        check.same_device("positions", positions, "k", k)
        own = lead if positions.dim() > 2 else ()
        check.shape("positions", positions, (*own, num_blocks, block_size), "[*, num_blocks, block_size]")
        positions = positions.reshape(batch if own else 1, num_blocks, block_size).contiguous()
    codes_k, codes_v, k_scale, v_scale = overload("quantize_blocks", backend, k.device)(
        check.collapse("k", k, 4), check.collapse("v", v, 4), positions, dtype == "int4"
    )
    if dtype == "fp8":
        codes_k, codes_v = codes_k.view(torch.float8_e4m3fn), codes_v.view(torch.float8_e4m3fn)
    return QuantizedBlocks(*(x.view(*lead, *x.shape[1:]) for x in (codes_k, codes_v, k_scale, v_scale)))


def _fake(k: Tensor, v: Tensor, positions: Tensor | None, int4: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rows, heads, dim = k.shape
    codes = [k.new_empty((*rows, heads, dim // 2 if int4 else dim), dtype=torch.uint8) for _ in range(2)]
    if not int4:
        scales = [k.new_empty((*rows[:2], heads), dtype=torch.float32) for _ in range(2)]
        return codes[0], codes[1], scales[0], scales[1]
    pairs = [k.new_empty(shape, dtype=torch.float16) for shape in ((*rows[:2], heads, 2, dim), (*rows, heads, 2))]
    return codes[0], codes[1], pairs[0], pairs[1]


define(
    "quantize_blocks",
    "(Tensor k, Tensor v, Tensor? positions, bool int4) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.quantize_blocks",
)
