# SPDX-License-Identifier: Apache-2.0
"""Stock transformers, as good as it gets: the video kept whole in its cache, or read anew for every question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from livevlm.benchmark.subject import Subject
from livevlm.benchmark.timing import synchronise


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Without cuDNN's attention, that is; see `livevlm.benchmark`."""
    on = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(on)


class Stock:
    """One video in a DynamicCache."""

    def __init__(self, subject: Subject) -> None:
        self.model: Any = subject.model
        self.device, self.question = subject.device, subject.question_ids.to(subject.device)
        before, _ = subject.processor.prompt("?")
        self.prompt = before.to(subject.device)
        self.cache = DynamicCache(config=self.model.config.text_config)
        self._forward(self._embed(self.prompt))

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(token_ids)

    @torch.no_grad()
    def _forward(self, embeds: Tensor, cache: Any = None) -> Tensor:
        """The likeliest token after these embeddings."""
        chosen = self.cache if cache is None else cache
        with without_cudnn():
            output = self.model.model.language_model(inputs_embeds=embeds[None], past_key_values=chosen)
        hidden = output.last_hidden_state
        return self.model.lm_head(hidden[:, -1]).argmax(-1)

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        found = self.model.model.get_video_features(pixels[None]).pooler_output
        return found.reshape(-1, found.shape[-1])

    def push(self, pixels: Tensor) -> None:
        """Normalised pixels `[num_frames, 3, size, size]`, ready on the device."""
        self._forward(self._features(pixels))

    def _with_newline(self, token_ids: Tensor) -> Tensor:
        newline = self.model.model.image_newline[None].to(self.device, self.model.dtype)
        return torch.cat((newline, self._embed(token_ids)))

    @torch.no_grad()
    def ask(self, num_tokens: int) -> tuple[float, float]:
        """TTFT in ms and ms a token after it; the question is taken back."""
        before = self.cache.get_seq_length()
        try:
            return self._timed(lambda: self._forward(self._with_newline(self.question)), self.cache, num_tokens)
        finally:
            self.cache.crop(before - self.cache.get_seq_length())

    @torch.no_grad()
    def ask_at_once(self, pixels: Tensor, num_tokens: int) -> tuple[float, float]:
        """The same with prompt, video and question read in one go, as `generate` does."""
        cache = DynamicCache(config=self.model.config.text_config)

        def read() -> Tensor:
            parts = (self._embed(self.prompt), self._features(pixels), self._with_newline(self.question))
            return self._forward(torch.cat(parts), cache)

        return self._timed(read, cache, num_tokens)

    def _timed(self, read: Any, cache: Any, num_tokens: int) -> tuple[float, float]:
        synchronise(self.device)
        start = time.perf_counter()
        token = read()
        int(token)
        first = time.perf_counter()
        for _ in range(num_tokens):
            token = self._forward(self._embed(token), cache)
            int(token)  # a user sees it
        return (first - start) * 1e3, (time.perf_counter() - first) * 1e3 / max(1, num_tokens)
