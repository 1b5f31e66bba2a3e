# SPDX-License-Identifier: Apache-2.0
"""Every knob of a stream, with its default and where the default comes from."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from typing_extensions import Self

from livevlm.errors import ConfigError
from livevlm.types import (
    Attention,
    Graphs,
    PolicyName,
    Pooling,
    Positions,
    RetrievalName,
    RetrievalPass,
    RetrievalQueries,
    Scope,
)

CONFIG_FILE = "livevlm_config.json"
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Config:
    """Settings of one stream.

    "LiveVLM" is arXiv 2505.15269 (v1: May 2025, v2: April 2026); "repo" is a value its official repository is
    reported to use; "ours" is what the papers leave open.

    Attributes:
        policy: how the memory is kept within its budget. "novelty" (ours; made for `scope="shared"`), "vision_sink"
            (LiveVLM v2, Vision Sink Bucketing), "clip_merge" (LiveVLM v1), "similarity" (InfiniPot-V, arXiv
            2506.15745), "proxy_query" (StreamMem), and the baselines "recent", "uniform", "random" and "full" (keeps
            everything, unbounded).
        budget: video tokens that are left per layer when the memory is compressed. 12,000 (LiveVLM v2). The prompt and
            the question come on top.
        max_memory: budget in bytes instead, for keys and values of all layers, e.g. "2GiB"; overrides `budget`. Room
            for the clip being read and for a question is allocated beside it.
        clip_frames: most frames that go through the language model at once, 32 (LiveVLM v2, repo). Attention inside a
            clip is full; the memory may exceed its budget by one clip while the clip is being read.
        slack: how far clips of fewer than `clip_frames` frames may pile up above the budget before the memory is
            compressed to its budget again, as a share of the budget, 0.4 (ours); never more than `clip_frames` frames.
            Compressing costs as much after one frame as after many. A question sees whatever is there, so up to
            `budget * (1 + slack)` tokens. 0: compress after every clip. Pushes of `clip_frames` frames or more are
            always followed by it, and so is every clip of "clip_merge", which merges each by itself.
        recent_frames: newest frames that are never evicted and always attended to, 1 (ours; LiveVLM v2, repo: 2).
        scope: "shared": scores are averaged over layers and all layers keep the same tokens (ours); "layer": every
            layer keeps its own tokens (LiveVLM v2, as far as is known).
        num_score_queries: newest vision tokens whose attention scores the memory, r = 64 (the papers do not say; ours).
        scatter_ratio: share of the budget spread over time buckets, 0.5 (LiveVLM v2, repo). 0 is plain top-k.
        bucket_capacity: tokens a bucket takes, 1 (LiveVLM v2).
        bucket_by: "index": buckets of equally many cached tokens (LiveVLM v2); "time": of equal duration (ours).
        clip_keep_ratio: `clip_merge`: share of a clip's tokens that survives, 0.25 (v1 does not say; ours).
        alpha: `similarity`: share of the budget chosen by temporal redundancy, the rest by value norm, 0.5
            (InfiniPot-V).
        recent_ratio: `similarity`: share of the budget held by the newest frames, 0.25 (InfiniPot-V).
        policy_seed: `random`: another number draws other tokens, 0 (ours).
        retrieval: which part of the memory a question attends to. "none" (ours): all of it; "mean_key" (LiveVLM v2,
            Page-based Retrieval); "mass" (ours): by the exact attention to each block, for which all keys are read;
            "frame" (ReKV, arXiv 2503.00540).
        retrieval_ratio: `mean_key`, `mass`: share of the blocks retrieved, 0.4 (LiveVLM v2).
        block_size: `mean_key`, `mass`: tokens in a block, 16 (LiveVLM v2).
        num_retrieved_frames: `frame`: blocks of one frame that are retrieved, 64 (ReKV).
        pooling: of `mean_key` and `frame`. "query": the mean question query against the representatives (ReKV; LiveVLM
            v2 as we read it); "softmax": a softmax per query token and head, then the sum (ours).
        retrieval_pass: whose queries choose the blocks. "inline" (ours): those of the one pass that reads the question,
            chat template included. "two_pass" (ReKV; LiveVLM v2 as we read it): a pass of its own over the question's
            text alone goes first; like a question, it attends to the prompt, the newest frames and what each layer has
            just chosen (as ReKV's code does). It costs a second pass.
        retrieval_queries: which queries of that pass choose. "all" of them (ReKV; LiveVLM v2 as we read it), or the
            "last" token's, which the answer is predicted from (ours; Quest, arXiv 2406.10774, also chooses by one
            query, anew for every token). None: "last" for `mass` inline, else "all".
        positions: "spread" (ours): tokens are numbered by their place in the stream while it is short enough, then
            nearer together, in proportion, so that no position exceeds the model's `max_position_embeddings`;
            "original": always by their place in the stream; "packed": by their place among those attended to (ReKV).
            Keys are stored un-rotated, so this is a choice of reading, not of writing.
        attention: how the memory is read. "auto": on a GPU in place, by the fused kernels of
            `livevlm_kernels.block_attention`, for 16-bit models, where that is the fastest (with heads of other sizes
            than 64 and 128: for few tokens at a time); else gathered, through PyTorch's attention ("sdpa").
            "cuda", "triton", "cpu", "reference": in place, by that backend.
        graphs: "auto": `Stream.ask` replays CUDA graphs where it can: 16-bit Qwen2 models on a GPU, questions of up to
            256 tokens; `stats().graphs` says what happened. Reading does the same with clips of up to eight frames; see
            `stats().why_eager`. "on": an error where model, device or settings do not allow it, or capturing fails.
            "off": never.
        max_new_tokens: longest answer, 128 (ours).
    """

    policy: PolicyName = "novelty"
    budget: int = 12_000
    max_memory: int | str | None = None
    clip_frames: int = 32
    slack: float = 0.4
    recent_frames: int = 1
    scope: Scope = "shared"
    num_score_queries: int = 64
    scatter_ratio: float = 0.5
    bucket_capacity: int = 1
    bucket_by: str = "index"
    clip_keep_ratio: float = 0.25
    alpha: float = 0.5
    recent_ratio: float = 0.25
    policy_seed: int = 0
    retrieval: RetrievalName = "none"
    retrieval_ratio: float = 0.4
    block_size: int = 16
    num_retrieved_frames: int = 64
    pooling: Pooling = "query"
    retrieval_pass: RetrievalPass = "inline"
    retrieval_queries: RetrievalQueries | None = None
    positions: Positions = "spread"
    attention: Attention = "auto"
    graphs: Graphs = "auto"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        choices = {
            "policy": get_args(PolicyName),
            "scope": get_args(Scope),
            "bucket_by": ("index", "time"),
            "retrieval": get_args(RetrievalName),
            "pooling": get_args(Pooling),
            "positions": get_args(Positions),
            "attention": get_args(Attention),
            "graphs": get_args(Graphs),
            "retrieval_pass": get_args(RetrievalPass),
            "retrieval_queries": (*get_args(RetrievalQueries), None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(map(str, allowed))}")
        counts = ("budget", "clip_frames", "recent_frames", "num_score_queries", "bucket_capacity", "block_size")
        for name in (*counts, "num_retrieved_frames", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        seed = self.policy_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ConfigError(f"policy_seed={seed!r} must be a whole number from 0 to {2**31 - 1}")
        for name in ("clip_keep_ratio", "recent_ratio", "retrieval_ratio", "scatter_ratio", "alpha", "slack"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number")
        for name in ("clip_keep_ratio", "recent_ratio", "retrieval_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be above 0 and at most 1")
        for name in ("scatter_ratio", "alpha", "slack"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must lie between 0 and 1")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    def budget_tokens(self, kv_bytes_per_token: int, tokens_per_frame: int) -> int:
        """Video tokens to keep per layer, from `max_memory` if it is set, else `budget`.

        Args:
            kv_bytes_per_token: bytes of keys and values of all layers for one token.
            tokens_per_frame: video tokens of one frame.

        Raises:
            ConfigError: the budget does not hold the `recent_frames` newest frames, which are never evicted.
        """
        tokens = self.budget
        said = f"budget={self.budget} tokens"
        if self.max_memory is not None:
            tokens = parse_bytes(self.max_memory) // kv_bytes_per_token
            said = f"max_memory={self.max_memory!r} ({tokens} tokens of {kv_bytes_per_token} bytes)"
        least = self.recent_frames * tokens_per_frame
        if self.policy == "similarity":
            least = self.recent_tokens(tokens, tokens_per_frame)
        if tokens < max(least, tokens_per_frame):
            raise ConfigError(
                f"{said} is too small: {self.recent_frames} recent frames of {tokens_per_frame} tokens are always "
                f"kept, so at least {max(least, tokens_per_frame)} tokens are needed"
            )
        return tokens

    def recent_tokens(self, budget: int, tokens_per_frame: int) -> int:
        """Tokens of the newest frames that the policy never evicts; always whole frames."""
        frames = self.recent_frames
        if self.policy == "similarity":
            frames = max(frames, math.floor(self.recent_ratio * budget / tokens_per_frame))
        return frames * tokens_per_frame

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `livevlm_config.json` beside a checkpoint; `livevlm.load` picks it up as that model's default."""
        Path(folder, CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> Self:
        """The settings in a local checkpoint's folder (defaults if it has none), with `overrides` on top.

        Raises:
            ConfigError: there is no such folder, or its file is not valid JSON or has a setting this version does not
                know.
        """
        if not Path(folder).is_dir():
            raise ConfigError(f"{str(folder)!r} is not a folder; elsewhere take livevlm.load(...).config")

        path = Path(folder, CONFIG_FILE)
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{path} must hold a JSON object of settings")
        unknown = sorted(set(found) | set(overrides))
        unknown = [name for name in unknown if name not in {field.name for field in fields(cls)}]
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(unknown)}; allowed: {', '.join(cls.__annotations__)}")
        return cls(**{**found, **overrides})


def parse_bytes(value: int | str) -> int:
    """Bytes of `512`, "512", "1.5GiB", "800 MB".

    Raises:
        ConfigError: not a positive number with one of the units B, KiB, MiB, GiB, KB, MB, GB.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
    try:
        size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if size < 1:
        raise ConfigError(f"max_memory={value!r} must be a positive size such as 800MB, 2GiB or a number of bytes")
    return int(size)
