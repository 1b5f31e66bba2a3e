# SPDX-License-Identifier: Apache-2.0
"""`model.generate` with a LiveCache. It runs transformers' own loop, without CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from livevlm.decoding import choose_blocks
from livevlm.errors import QuestionError

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
    "guidance_scale": (1, "it runs the prompt twice"),
}


@torch.no_grad()
def checked_generate(
    cache: LiveCache,
    stock_generate: Callable[..., Any],
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` over a stream's memory.

    With video tokens in `input_ids`, the text before them is read as the stream's prompt, the frames of
    `pixel_values_videos` are pushed, and the text after them is the question: for a cache that has seen no frame.
    Without, `input_ids` or `inputs_embeds` is the question about what has been pushed so far. Question and answer are
    forgotten afterwards; a call that fails leaves the cache as it was. Logits processors and stopping criteria see the
    answer's tokens, not the prompt's.

    Returns:
        What generate returns: `input_ids` with the answer behind it (the answer alone for `inputs_embeds`).

    Raises:
        QuestionError: arguments that have no meaning over one stream's memory.
    """
    settings = generation_config if generation_config is not None else cache.adapter.model.generation_config
    for name, (allowed, why) in _REFUSED.items():
        value = kwargs.get(name, getattr(settings, name, None))
        if value not in (allowed, None):
            raise QuestionError(f"{name}={value!r} is not supported with a LiveCache: {why}")
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
    if input_ids is None and pixel_values_videos is not None:
        raise QuestionError("pixel_values_videos needs input_ids, whose video tokens say where the video stands")

    if generation_config is not None:
        kwargs["generation_config"] = settings = copy.deepcopy(generation_config)
    if input_ids is None:
        return _answer(cache, stock_generate, given, kwargs)
    _count_answer_only(kwargs, settings if generation_config is not None else None, input_ids.shape[1])
    question = _question_of(cache, input_ids[0], pixel_values_videos)
    if pixel_values_videos is None:
        result = _answer(cache, stock_generate, cache.adapter.embed_question(question)[None], kwargs)
    else:  # for an empty cache: see _question_of
        prompt = cache.prompt
        try:
            cache.prefill_prompt(input_ids[0, : input_ids[0].tolist().index(cache.adapter.video_token_id)])
            cache.push(pixel_values_videos[0], torch.arange(pixel_values_videos.shape[1], dtype=torch.float64))
            result = _answer(cache, stock_generate, cache.adapter.embed_question(question)[None], kwargs)
        except BaseException:
            cache.reset()
            if prompt is not None:
                cache.prefill_prompt(prompt)
            raise
    if isinstance(result, Tensor):
        return torch.cat((input_ids, result.to(input_ids.device)), dim=1)
    result.sequences = torch.cat((input_ids, result.sequences.to(input_ids.device)), dim=1)
    return result


def _answer(cache: LiveCache, stock_generate: Callable[..., Any], embeds: Tensor, kwargs: dict[str, Any]) -> Any:
    with cache.question():
        if cache.config.retrieval_pass == "two_pass":
            choose_blocks(cache, embeds[0])
        return stock_generate(inputs_embeds=embeds, past_key_values=cache, **kwargs)


def _count_answer_only(kwargs: dict[str, Any], settings: Any, num_prompt_tokens: int) -> None:
    """Turns lengths that count the prompt into lengths of the answer: the model is not given the prompt again."""
    for name, new_name in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = kwargs.pop(name, None)
        if length is None and settings is not None:
            length = getattr(settings, name, None)
            setattr(settings, name, None)
        new = kwargs.get(new_name)
        if new is None and settings is not None:
            new = getattr(settings, new_name, None)
        if length and new is None:
            kwargs[new_name] = max(length - num_prompt_tokens, 1 if name == "max_length" else 0)


def _question_of(cache: LiveCache, ids: Tensor, pixel_values_videos: Tensor | None) -> Tensor:
    """The question's token ids, after all checks of `ids` and of the video they speak of."""
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
    if cache.num_frames:
        raise QuestionError(
            f"this LiveCache has watched {cache.num_frames} frames already, and a prompt with a video would add its "
            "frames again: pass the new question alone, and further frames to cache.push"
        )
    return question
