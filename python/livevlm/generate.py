# SPDX-License-Identifier: Apache-2.0
"""Answers: the decoding loop of `Stream.ask`, and `model.generate` with a LiveCache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from livevlm.errors import QuestionError
from livevlm.options import Sampler

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

# What generate() would do wrong, or not at all, over a memory of one stream.
_REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "beam search needs several copies of the memory"),
    "num_return_sequences": (1, "it needs several copies of the memory"),
    "prefill_chunk_size": (None, "the question is read at once"),
    "use_cache": (True, "the memory is the cache"),
    "assistant_model": (None, "assisted generation crops its cache"),
    "prompt_lookup_num_tokens": (None, "assisted generation crops its cache"),
    "pixel_values": (None, "only videos can be streamed"),
    "position_ids": (None, "positions follow from the memory; see Config.positions"),
    "cache_implementation": (None, "the LiveCache is the cache"),
}


@torch.no_grad()
def next_logits(cache: LiveCache, embeds: Tensor) -> Tensor:
    """Reads embeddings `[num_tokens, hidden]` of question or answer; logits `[1, vocab_size]` of what follows."""
    output = cache.adapter.language_model(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    return cache.adapter.logits(output.last_hidden_state[:, -1])


def decode(
    cache: LiveCache, logits: Tensor, sampler: Sampler, *, max_new_tokens: int, stop: Collection[int]
) -> Iterator[int]:
    """Token ids of the answer, one by one, up to a stop token; `logits` are those of its first token."""
    for count in range(1, max_new_tokens + 1):
        with torch.no_grad():
            token = sampler(logits)
        token_id = int(token)
        if token_id in stop:
            return
        yield token_id
        if count < max_new_tokens:
            with torch.no_grad():
                embeds = cache.adapter.embed_tokens(token)
            logits = next_logits(cache, embeds)


@torch.no_grad()
def checked_generate(
    cache: LiveCache,
    stock_generate: Callable[..., Any],
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` over a stream's memory.

    With video tokens in `input_ids`, the text before them is read as the stream's prompt (once), the frames of
    `pixel_values_videos` are pushed, and the text after them is the question. Without, `input_ids` or `inputs_embeds`
    is the question about what has been pushed so far. Question and answer are forgotten afterwards.

    Returns:
        What generate returns: `input_ids` with the answer behind it (the answer alone for `inputs_embeds`).

    Raises:
        QuestionError: arguments that have no meaning over one stream's memory.
    """
    for name, (allowed, why) in _REFUSED.items():
        if kwargs.get(name, allowed) not in (allowed, None):
            raise QuestionError(f"{name}={kwargs[name]!r} is not supported with a LiveCache: {why}")
    kwargs.pop("past_key_values", None)
    input_ids = inputs if input_ids is None else input_ids
    if (input_ids is None) == (inputs_embeds is None):
        raise QuestionError("give generate() exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if given.shape[0] != 1:
        raise QuestionError(f"batch size {given.shape[0]} is not supported with a LiveCache; allowed: 1")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise QuestionError("attention_mask hides tokens; with a LiveCache pass prompts without padding")

    if input_ids is None:
        if pixel_values_videos is not None:
            raise QuestionError("pixel_values_videos needs input_ids, whose video tokens say where the video stands")
        embeds = given
    else:
        question = _push_video(cache, input_ids[0], pixel_values_videos)
        embeds = cache.adapter.embed_question(question)[None]
        if (max_length := kwargs.pop("max_length", None)) is not None:
            kwargs["max_new_tokens"] = kwargs.get("max_new_tokens") or max_length - input_ids.shape[1]

    with cache.question():
        result = stock_generate(inputs_embeds=embeds, past_key_values=cache, **kwargs)
    if input_ids is None:
        return result
    if isinstance(result, Tensor):
        return torch.cat((input_ids, result.to(input_ids.device)), dim=1)
    result.sequences = torch.cat((input_ids, result.sequences.to(input_ids.device)), dim=1)
    return result


def _push_video(cache: LiveCache, ids: Tensor, pixel_values_videos: Tensor | None) -> Tensor:
    """Reads what stands before and in the video tokens of `ids`, after all checks; returns the question's ids."""
    adapter = cache.adapter
    if bool((ids == adapter.image_token_id).any()):
        raise QuestionError("input_ids hold image tokens; only videos can be streamed")
    at = (ids == adapter.video_token_id).nonzero()[:, 0]
    question = ids[int(at[-1]) + 1 :] if at.numel() else ids
    if not question.numel():
        raise QuestionError("input_ids hold no question" + (" after the video" if at.numel() else ""))
    if pixel_values_videos is None:
        if at.numel():
            raise QuestionError("input_ids hold video tokens but pixel_values_videos is missing")
        return question
    if pixel_values_videos.dim() != 5 or pixel_values_videos.shape[0] != 1:
        shape = tuple(pixel_values_videos.shape)
        raise QuestionError(f"pixel_values_videos must have shape [1, num_frames, 3, height, width], not {shape}")
    num_frames = pixel_values_videos.shape[1]
    expected = num_frames * adapter.tokens_per_frame + 1
    if at.numel() != expected or int(at[-1] - at[0]) != expected - 1:
        raise QuestionError(f"input_ids hold {at.numel()} video tokens; {num_frames} frames need {expected} in a row")
    cache.prefill_prompt(ids[: int(at[0])])
    times = torch.arange(num_frames, dtype=torch.float64) + cache.num_frames
    cache.push(pixel_values_videos[0], times)
    return question
