# SPDX-License-Identifier: Apache-2.0
"""The SigLIP tower of transformers 5.17: a forward pass of our own over the stock modules' weights, without copies.

Between its products the stock tower makes copies and passes over memory that a GPU has to wait for. Here patches are
one product in the place of a convolution, the activation is in the epilogue of the product before it, attention's
output stays as it lies, and residuals are added in place. All else is as in the modules, rounding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unknown(tower: Any) -> str:
    """What keeps `hidden_states` from computing what a vision tower computes; empty if nothing does."""
    for part, expected in _parts(tower):
        found = type(part) if isinstance(expected, type) else type(part).__name__
        if found != expected:
            name = expected.__name__ if isinstance(expected, type) else expected
            return f"a {type(part).__name__} stands for a {name}"
        if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is None:
            return f"a {type(part).__name__} has no bias"
    conv, size, config = tower.embeddings.patch_embedding, (tower.embeddings.patch_size,) * 2, tower.config
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) != (size, size, "valid", (1, 1), 1):
        return "its convolution is not one product"
    if config.attention_dropout:
        return "it drops out"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r}"
    return ""


def _parts(tower: Any) -> Iterator[tuple[Any, type[nn.Module] | str]]:
    """Parts and what they must be, from the outside in: exactly that, since subclasses compute something else.

    Classes of transformers by name, as elsewhere; those of torch themselves, since other libraries use their names.
    """
    yield tower, "SiglipVisionModel"
    yield tower.embeddings, "SiglipVisionEmbeddings"
    yield tower.embeddings.patch_embedding, nn.Conv2d
    yield tower.embeddings.position_embedding, nn.Embedding
    yield tower.encoder, "SiglipEncoder"
    for layer in tower.encoder.layers:
        yield layer, "SiglipEncoderLayer"
        yield layer.self_attn, "SiglipAttention"
        yield layer.mlp, "SiglipMLP"
        yield layer.mlp.activation_fn, "GELUTanh"
        for norm in (layer.layer_norm1, layer.layer_norm2):
            yield norm, nn.LayerNorm
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2):
            yield linear, nn.Linear


def hidden_states(tower: Any, pixels: Tensor) -> Tensor:
    """What `tower.encoder` makes of `tower.embeddings(pixels)`, up to rounding: `[num_frames, num_patches, hidden]`.

    Args:
        tower: one that is not `unknown`.
        pixels: normalised, `[num_frames, 3, image_size, image_size]`, in the weights' dtype.
    """
    x = _patches(tower.embeddings, pixels)
    for layer in tower.encoder.layers:
        x = _layer(layer, x)
    return x


def _patches(embeddings: Any, pixels: Tensor) -> Tensor:
    """The patch convolution as one product: no two patches overlap, and what is left at the edges is not looked at."""
    size, conv = embeddings.patch_size, embeddings.patch_embedding
    num_frames, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    x = pixels[:, :, : rows * size, : columns * size].view(num_frames, channels, rows, size, columns, size)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(num_frames, rows * columns, channels * size * size)
    return F.linear(x, conv.weight.flatten(1), conv.bias).add_(embeddings.position_embedding.weight)


def _layer(layer: Any, x: Tensor) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    normed = _norm(layer.layer_norm1, x)
    heads = (*x.shape[:-1], attention.num_heads, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (_linear(projection, normed).view(heads).transpose(1, 2) for projection in projections)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    x = _linear(attention.out_proj, out.transpose(1, 2).reshape(x.shape)).add_(x)
    return _linear(mlp.fc2, _gelu(mlp.fc1, _norm(layer.layer_norm2, x))).add_(x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """A product and, of what it gives, GELU in the form with tanh.

    torch's operator for both at once means that form on CUDA devices, by cuBLAS's epilogue or by a kernel behind the
    product, and the form with erf on all others (addmm_out_cuda_impl in aten/src/ATen/native/cuda/Blas.cpp; the
    decomposition of `_addmm_activation` in torch/_decomp says so too). A test looks where the two forms differ.
    """
    if x.is_cuda:
        product = torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.t(), use_gelu=True)
        return product.unflatten(0, x.shape[:2])
    return F.gelu(_linear(linear, x), approximate="tanh")
