# SPDX-License-Identifier: Apache-2.0
"""Frames to pixels and questions to tokens, without torchvision."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import cached_file
from typing_extensions import Self

from livevlm.errors import ModelError, QuestionError

VIDEO = "<video>"
QUESTION = "What happens?"  # where a chat template puts this, it puts any question
# The template of the original conversion; used where a checkpoint ships none.
FALLBACK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<video>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Processor:
    """Tokenizer, chat template and pixel statistics of a checkpoint.

    Attributes:
        tokenizer: a transformers tokenizer.
        mean, std: per channel, of pixels scaled to 0..1. SigLIP's 0.5 (the image processor class's own default is
            CLIP's, and wrong for LLaVA-OneVision).
        chat_template: Jinja template; the tokenizer's own if None.
    """

    tokenizer: Any
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    chat_template: str | None = None
    _statistics: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _chats: dict[str, tuple[Tensor, str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Reads tokenizer, template and pixel statistics of a local checkpoint or one on the hub."""
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        found = _json(path, "video_preprocessor_config.json") or _json(path, "preprocessor_config.json") or {}
        template = (_json(path, "chat_template.json") or {}).get("chat_template")
        mean, std = found.get("image_mean", cls.mean), found.get("image_std", cls.std)
        return cls(tokenizer, tuple(mean), tuple(std), template)

    @classmethod
    def wrap(cls, processor: Any) -> Processor:
        """A livevlm Processor as it is; a transformers processor or a bare tokenizer as one.

        Raises:
            ModelError: the object has no tokenizer.
        """
        if isinstance(processor, Processor):
            return processor
        tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ModelError(
                f"processor is a {type(processor).__name__}; allowed: a transformers processor or tokenizer, or a "
                "livevlm.Processor"
            )
        pixels = getattr(processor, "video_processor", None)
        mean = getattr(pixels, "image_mean", None) or cls.mean
        std = getattr(pixels, "image_std", None) or cls.std
        return cls(tokenizer, tuple(mean), tuple(std), getattr(processor, "chat_template", None))

    def pixels(self, frames: Tensor, image_size: int) -> Tensor:
        """Frames, uint8 `[num_frames, 3, h, w]`, to normalised `[num_frames, 3, image_size, image_size]`, float32."""
        return self.normalised(self.resized(frames, image_size))

    def resized(self, frames: Tensor, image_size: int) -> Tensor:
        """Frames of any size to `[num_frames, 3, image_size, image_size]`, uint8, on the device they are on.

        Bicubic with antialiasing. On the CPU it is bit-identical to the stock video processor; CUDA has no uint8
        resize, so there it runs in float32 and is rounded to whole levels.
        """
        size = (image_size, image_size)
        if frames.shape[-2:] != size:
            if frames.device.type == "cpu":
                frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
            else:
                resized = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
                frames = resized.round_().clamp_(0, 255).to(torch.uint8)
        return frames.contiguous()  # whatever it was: a convolution may round otherwise in another layout

    def normalised(self, frames: Tensor) -> Tensor:
        """uint8 `[num_frames, 3, h, w]` as the vision tower wants it, float32."""
        if frames.device not in self._statistics:
            shape = (1, 3, 1, 1)
            mean = torch.tensor(self.mean, device=frames.device).view(shape)
            self._statistics[frames.device] = (mean, torch.tensor(self.std, device=frames.device).view(shape))
        mean, std = self._statistics[frames.device]
        return (frames.float() / 255 - mean) / std

    def prompt(self, question: str) -> tuple[Tensor, Tensor]:
        """Token ids before and after the video of a one-question chat, both `[num_tokens]` int64.

        Raises:
            QuestionError: the question is empty or holds a video marker.
        """
        if not isinstance(question, str) or not question.strip():
            raise QuestionError(f"question={question!r} is empty; ask something")
        for marker in (VIDEO, *self.tokenizer.all_special_tokens):
            if marker in question:
                raise QuestionError(f"question={question!r} holds {marker!r}, a marker of the model and no text")
        before, middle, end = self._chat()
        return before, self._ids(f"{middle}{question.strip()}{end}")

    def template(self) -> Tensor:
        """Token ids after the video of a chat whose question is empty, `[num_tokens]` int64: what all chats share."""
        _, middle, end = self._chat()
        return self._ids(f"{middle}{end}")

    def _chat(self) -> tuple[Tensor, str, str]:
        """Of a chat with one question: token ids before the video, text between the two, and text behind both.

        A template is run once, since running it takes longer than all that is left to do for a question.
        """
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None) or FALLBACK_TEMPLATE
        if template not in self._chats:
            self._chats[template] = self._parts_of(template)
        return self._chats[template]

    def _parts_of(self, template: str) -> tuple[Tensor, str, str]:
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
        before, video, after = text.partition(VIDEO)
        middle, question, end = after.partition(QUESTION)
        if not video or not question:
            raise ModelError(f"the chat template must place {VIDEO!r}, then {QUESTION!r}; it gave {text!r}")
        return self._ids(before), middle, end

    def text(self, question: str) -> Tensor:
        """Token ids of the question alone, without the chat around it, `[num_tokens]` int64."""
        return self._ids(question.strip())

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def _json(path: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint, local or from the hub; None if it has none."""
    file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text()) if file else None
