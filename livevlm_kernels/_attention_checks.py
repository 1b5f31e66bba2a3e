# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops that have queries, per-token vectors or RoPE. Like `_checks`, they read no data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from livevlm_kernels import _checks as check
from livevlm_kernels.errors import ArgumentError


def not_empty(name: str, value: Tensor) -> None:
    if value.numel() == 0:
        raise ArgumentError(f"{name} is empty: its shape is {tuple(value.shape)}; every dimension must be at least 1")


def writable(name: str, value: Tensor) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise ArgumentError(f"{name} has strides {value.stride()}: expanded dimensions cannot be written in place")


def movable(
    tensors: Sequence[object], tokens: Sequence[int], heads: Sequence[int], other_name: str, other: Tensor
) -> list[Tensor]:
    """Tensors whose rows can be moved in place, `[*tokens, *heads, ...]`, with one batch dimension each.

    Args:
        tokens: leading dimensions and seq_len.
        heads: num_kv_heads if every head has rows of its own, else nothing.
    """
    own = len(tokens) + len(heads)
    meaning = "[*, seq_len, num_kv_heads, ...]" if heads else "[*, seq_len, ...]"
    flat = []
    for number, value in enumerate(tensors):
        name = f"tensors[{number}]"
        result = check.tensor(name, value, min_ndim=own)
        check.same_device(name, result, other_name, other)
        not_empty(name, result)
        check.shape(name, result, (*tokens, *heads, *result.shape[own:]), meaning)
        writable(name, result)
        flat.append(check.collapse(name, result, result.dim() - len(tokens) + 1))
    return flat


def tokens(name: str, value: object, min_ndim: int = 3) -> Tensor:
    """A non-empty float tensor `[*, seq_len, num_kv_heads, head_dim]`."""
    result = check.tensor(name, value, min_ndim=min_ndim)
    check.dtype(name, result, check.FLOATS)
    not_empty(name, result)
    return result


def like(name: str, value: object, other_name: str, other: Tensor, shape: Sequence[int], meaning: str) -> Tensor:
    """A tensor of `shape` with the dtype and on the device of `other`."""
    result = check.tensor(name, value)
    check.dtype(name, result, (other.dtype,))
    check.same_device(name, result, other_name, other)
    check.shape(name, result, shape, meaning)
    return result


BYTES = (torch.float8_e4m3fn, torch.uint8)  # dtypes of what `quantize_blocks` gives


def pools(k: object, v: object, k_scale: Tensor | None, v_scale: Tensor | None) -> bool:
    """Pools of keys and values, `[num_blocks, block_size, num_kv_heads, head_dim]`; whether they are quantised."""
    check.tensor("k", k, min_ndim=4)
    pool = check.tensor("k", k, ndim=4)
    quantized = k_scale is not None or v_scale is not None
    if quantized:
        check.dtype("k", pool, BYTES)
    elif pool.dtype in BYTES:
        dtype = str(pool.dtype).removeprefix("torch.")
        raise ArgumentError(f"k has dtype {dtype}, which needs k_scale and v_scale: see quantize_blocks")
    else:
        check.dtype("k", pool, check.FLOATS)
    not_empty("k", pool)
    like("v", v, "k", pool, pool.shape, "[num_blocks, block_size, num_kv_heads, head_dim]")
    return quantized


def scales(q: Tensor, k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """What quantised pools, of keys like `k`, are to be scaled by for queries `q`."""
    num_blocks, block_size, num_kv_heads, _ = k.shape
    dtype, meanings = torch.float32, ("[num_blocks, num_kv_heads]",) * 2
    shapes: list[tuple[int, ...]] = [(num_blocks, num_kv_heads)] * 2
    if k.dtype == torch.uint8:
        dtype = torch.float16
        meanings = "[num_blocks, num_kv_heads, 2, head_dim]", "[num_blocks, block_size, num_kv_heads, 2]"
        shapes = [(num_blocks, num_kv_heads, 2, q.shape[-1]), (num_blocks, block_size, num_kv_heads, 2)]
    names = "k_scale", "v_scale"
    for name, value, shape, meaning in zip(names, (k_scale, v_scale), shapes, meanings, strict=True):
        scale = check.tensor(name, value)
        check.dtype(name, scale, (dtype,))
        check.same_device(name, scale, "k", k)
        check.shape(name, scale, shape, meaning)
        if not scale.is_contiguous():
            raise ArgumentError(f"{name} must be contiguous; its strides are {scale.stride()}")


def per_token(
    name: str,
    value: Tensor | None,
    dtypes: Sequence[torch.dtype],
    other_name: str,
    other: Tensor,
    shape: Sequence[int],
    meaning: str = "[*, seq_len]",
) -> Tensor | None:
    """An optional small tensor `[*, n]` flattened to `[batch, n]`, by a copy if it must be; None stays None."""
    if value is None:
        return None
    check.tensor(name, value)
    check.dtype(name, value, dtypes)
    check.same_device(name, value, other_name, other)
    check.shape(name, value, shape, meaning)
    return value.reshape(math.prod(shape[:-1]), shape[-1]).contiguous()


def queries(q: object, k: Tensor, lead: Sequence[int], num_kv_heads: int, head_dim: int) -> Tensor:
    """Queries `[*, num_queries, num_qo_heads, head_dim]` that fit keys with these leading dimensions and heads."""
    result = tokens("q", q)
    check.dtype("q", result, (k.dtype,))
    check.same_device("q", result, "k", k)
    num_queries, num_qo_heads = result.shape[-3:-1]
    expected = (*lead, num_queries, num_qo_heads, head_dim)
    check.shape("q", result, expected, "[*, num_queries, num_qo_heads, head_dim]")
    group("q", num_qo_heads, num_kv_heads)
    return result


def group(name: str, num_qo_heads: int, num_kv_heads: int) -> None:
    if num_qo_heads % num_kv_heads:
        raise ArgumentError(f"{name} has {num_qo_heads} heads; allowed: multiples of num_kv_heads = {num_kv_heads}")


def scale(sm_scale: float | None, head_dim: int) -> float:
    """The softmax scale, `head_dim ** -0.5` by default."""
    if sm_scale is None:
        return float(head_dim) ** -0.5
    if not 0 < sm_scale < math.inf:  # also catches NaN
        raise ArgumentError(f"sm_scale={sm_scale} must be positive and finite")
    return float(sm_scale)


def cos_sin_cache(
    value: Tensor | None,
    head_dim: int,
    other_name: str,
    other: Tensor,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    if value is None:
        return
    check.tensor("cos_sin_cache", value, ndim=2)
    check.dtype("cos_sin_cache", value, dtypes)
    check.same_device("cos_sin_cache", value, other_name, other)
    check.shape("cos_sin_cache", value, (value.shape[0], head_dim), "[max_position, head_dim]")
    not_empty("cos_sin_cache", value)
    if head_dim % 2:
        raise ArgumentError(f"head_dim={head_dim} must be even when cos_sin_cache is given")
