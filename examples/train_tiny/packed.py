# SPDX-License-Identifier: Apache-2.0
"""One forward pass that answers many questions about a video, each after another number of frames.

A row of the batch is ``prefix | video tokens | K questions of ROWS tokens | padding``.  Prefix and video are causal.
Question k sees the prefix, the video up to the moment when it is asked, and itself; its positions go on behind the
last frame it sees.  That is what the model computes when the video is streamed, so one pass over a video gives K
answers to learn from.  All of it uses the stock modules' weights, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from livevlm.synthetic import TOKENS_PER_FRAME
from words import NEWLINE, PREFIX, ROWS


def layout(asked: Tensor, frame_start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions of all tokens, int64 [S], and an additive mask [S - P, S] for those behind the P causal ones.

    asked: int64 [K], frames seen at each question. frame_start: int64 [T], position of each frame's first token if
    the prefix were empty; consecutive frames are TOKENS_PER_FRAME apart, more where there is a gap.
    """
    k, device = len(asked), asked.device
    video = len(PREFIX) + len(frame_start) * TOKENS_PER_FRAME
    rows = k * ROWS + -(video + k * ROWS) % 8  # rows of the mask must be aligned
    tokens = torch.arange(TOKENS_PER_FRAME, device=device)
    start = len(PREFIX) + frame_start
    behind = start[asked - 1] + TOKENS_PER_FRAME
    positions = [
        torch.arange(len(PREFIX), device=device),
        (start[:, None] + tokens).flatten(),
        (behind[:, None] + torch.arange(ROWS, device=device)).flatten(),
        torch.zeros(rows - k * ROWS, dtype=torch.long, device=device),
    ]
    row = torch.arange(rows, device=device)
    key = torch.arange(video + rows, device=device) - video
    seen = F.pad(len(PREFIX) + asked * TOKENS_PER_FRAME, (0, 1))[(row // ROWS).clamp(max=k)] - video  # padding: nothing
    sees = key < seen[:, None]
    sees |= (key >= 0) & (key <= row[:, None]) & (key // ROWS == (row // ROWS)[:, None])
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
    return torch.cat(positions), mask


def encode_frames(model: Any, frames: Tensor) -> Tensor:
    """Frames, uint8 [N, 3, H, W], to embeddings [N, TOKENS_PER_FRAME, hidden].

    What `get_video_features` computes. Patches go through a matrix product, and pooling, bilinear to half the size,
    is the mean of 2x2: both are several times faster than convolution and interpolation in bfloat16.
    """
    tower, config = model.model.vision_tower, model.config.vision_config
    n, patch, side = len(frames), config.patch_size, config.image_size // config.patch_size
    pixels = frames.float() / 127.5 - 1
    patches = pixels.view(n, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)
    embeddings = tower.embeddings
    x = F.linear(patches, embeddings.patch_embedding.weight.flatten(1), embeddings.patch_embedding.bias)
    x = x.float() + embeddings.position_embedding.weight
    for layer in tower.encoder.layers:
        h = layer.layer_norm1(x)
        attention = layer.self_attn
        q, k, v = (
            product(h).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for product in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    x = model.model.multi_modal_projector(x)
    return x.view(n, side // 2, 2, side // 2, 2, -1).mean((2, 4)).flatten(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, heads, S, head_dim]; k and v have as many heads."""
    causal = q.shape[2] - mask.shape[0]
    video = F.scaled_dot_product_attention(q[:, :, :causal], k[:, :, :causal], v[:, :, :causal], is_causal=True)
    everything = mask.expand(*q.shape[:2], -1, -1)
    questions = F.scaled_dot_product_attention(q[:, :, causal:], k, v, attn_mask=everything)
    return torch.cat([video, questions], 2)


def read(model: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The language model's layers over embeddings [B, S, hidden], without the last norm."""
    language_model, config = model.model.language_model, model.config.text_config
    head_dim = config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, head_dim, 2, device=x.device) / head_dim
    angle = positions.float()[:, None] * (1 / config.rope_parameters["rope_theta"] ** exponent)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in language_model.layers:
        attention = layer.self_attn
        h = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, config.rms_norm_eps)
        q, k, v = (
            product(h).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for product in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        heads = _attend(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask)
        x = x + attention.o_proj(heads.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, config.rms_norm_eps)
        x = x + layer.mlp(h)
    return x


def packed_forward(
    model: Any, frames: Tensor, ids: Tensor, answer_at: Tensor, asked: Tensor, frame_start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K, vocab] of the answers and of what follows them, and the frames' embeddings [B, T * 16, hidden].

    frames: uint8 [B, T, 3, H, W]. ids, answer_at: of `words.Encoder`. asked, frame_start: see `layout`.
    """
    language_model, (b, k) = model.model.language_model, answer_at.shape
    features = encode_frames(model, frames.flatten(0, 1)).view(b, -1, model.config.text_config.hidden_size)
    autocast = torch.is_autocast_enabled(frames.device.type)
    dtype = torch.get_autocast_dtype(frames.device.type) if autocast else features.dtype
    positions, mask = layout(asked, frame_start, dtype)

    embedding = language_model.embed_tokens.weight
    prefix = torch.stack([embedding[token] for token in PREFIX]).expand(b, -1, -1)
    words = language_model.embed_tokens(ids.flatten(1))
    words = torch.where((ids.flatten(1) == NEWLINE)[..., None], model.model.image_newline, words)
    padding = words.new_zeros(b, mask.shape[0] - words.shape[1], words.shape[2])
    x = torch.cat([prefix, features.to(words.dtype), words, padding], 1)
    x = read(model, x, positions, mask)

    rows = x[:, -mask.shape[0] :][:, : k * ROWS].view(b, k, ROWS, -1)
    at = answer_at[..., None, None].expand(-1, -1, 1, x.shape[-1])
    last = torch.cat([rows.gather(2, at), rows.gather(2, at + 1)], 2)
    epsilon = model.config.text_config.rms_norm_eps
    logits = model.lm_head(F.rms_norm(last, x.shape[-1:], language_model.norm.weight, epsilon))
    return logits[:, :, 0].float(), logits[:, :, 1].float(), features
