# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the embedded tiny one, a folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

from livevlm.config import Config
from livevlm.errors import ConfigError, LiveVLMError, ModelError
from livevlm.models import ADAPTERS
from livevlm.processing import Processor

TINY = Path(__file__).with_name("tiny-onevision")


class Checkpoint(NamedTuple):
    """All that `livevlm.Stream(*checkpoint)` needs."""

    model: Any
    processor: Processor
    config: Config


def load(name: str | Path = "tiny", *, device: str | torch.device = "auto", dtype: Any = "auto") -> Checkpoint:
    """Loads a LLaVA-OneVision checkpoint, ready to stream.

    Args:
        name: "tiny" (4.3 M parameters, inside the package), a folder, or a hub name such as
            "llava-hf/llava-onevision-qwen2-7b-ov-hf".
        device: "auto" is the GPU if there is one.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU, where bfloat16 is slow.

    Returns:
        model, processor, and the settings in a local checkpoint's `livevlm_config.json`, or the defaults; change some
        with `dataclasses.replace(config, budget=...)`.

    Raises:
        ModelError: there is no such checkpoint, or its family is not supported.
        ConfigError: there is no such device here.
    """
    path = TINY if str(name) == "tiny" else name
    target = find_device(device)
    if dtype == "auto" and target.type == "cpu":
        dtype = torch.float32
    if not Path(path).is_dir() and str(name).count("/") != 1:
        raise ModelError(f"{str(name)!r} is no folder; allowed: 'tiny', a folder, or a hub name like org/model")
    try:
        family = AutoConfig.from_pretrained(str(path)).model_type
        if family not in ADAPTERS:
            raise ModelError(f"{name} is a {family!r} model, which is not supported; supported: {', '.join(ADAPTERS)}")
        processor = Processor.from_pretrained(path)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(str(path), dtype=dtype)
    except LiveVLMError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers each have their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no checkpoint could be loaded from {str(name)!r}: {first_line}") from error
    folder = Path(path)
    config = Config.from_pretrained(folder) if folder.is_dir() else Config()
    return Checkpoint(model.to(target).eval(), processor, config)


def find_device(name: str | torch.device) -> torch.device:
    """A device that can be used; "auto" is the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
