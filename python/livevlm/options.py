# SPDX-License-Identifier: Apache-2.0
"""Options of one question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from typing_extensions import TypedDict

from livevlm.errors import ConfigError


class AskOptions(TypedDict, total=False):
    """Keyword arguments of `Stream.ask`; see there."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    num_evidence: int


@dataclass(frozen=True)
class Decoding:
    """`AskOptions` with their defaults, checked."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_evidence: int = 3

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_evidence"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number")
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_evidence", self.num_evidence >= 0, "at least 0"),
        ):
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)} must be {allowed}")


class Sampler:
    """Chooses the next token: the likeliest one, or with a temperature a random one."""

    def __init__(self, options: Decoding, device: torch.device) -> None:
        self.warpers: LogitsProcessorList | None = None
        self.generator: torch.Generator | None = None
        if options.temperature > 0:
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(options.temperature), TopPLogitsWarper(options.top_p)]
            )
            self.generator = torch.Generator(device)
            self.generator.manual_seed(torch.seed() if options.seed is None else options.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits `[1, vocab_size]` -> token ids `[1]`."""
        if self.warpers is None:
            return logits.argmax(-1)
        no_text = torch.empty((1, 0), dtype=torch.int64, device=logits.device)  # these warpers look at scores only
        probabilities = self.warpers(no_text, logits.float()).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
