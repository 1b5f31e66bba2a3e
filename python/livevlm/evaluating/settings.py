# SPDX-License-Identifier: Apache-2.0
"""What is compared: memories under names of their own, ways of retrieval, and shares of a stream's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from livevlm.config import Config
from livevlm.errors import ConfigError
from livevlm.types import Positions

RETRIEVED = 0.4  # share of the blocks that a retrieval attends to (LiveVLM v2)
QUARTER = "-25"  # ends names of those that attend to 25 % of the memory, the newest frames included


@dataclass(frozen=True)
class Preset:
    """A memory.

    Attributes:
        settings: of `Config`; if "retrieval" is among them, it is not combined with other ways of retrieval.
        share_of: what the budget is a share of the stream's tokens of: those kept, those retrieved (everything is
            kept then), or None: there is no budget to choose.
    """

    settings: Mapping[str, Any]
    share_of: Literal["kept", "retrieved"] | None = "kept"


_SCORED = ("novelty", "similarity", "vision_sink", "clip_merge", "proxy_query")
PRESETS: dict[str, Preset] = {
    "full": Preset({"policy": "full"}, share_of=None),
    # The newest frame alone: what can be answered without a memory.
    "blind": Preset({"policy": "recent", "recent_frames": 1, "retrieval": "none"}, share_of=None),
    "recent": Preset({"policy": "recent"}),
    "uniform": Preset({"policy": "uniform"}),
    "random": Preset({"policy": "random"}),
    **{name: Preset({"policy": name, "scope": "shared"}) for name in _SCORED},
    **{f"{name}-layer": Preset({"policy": name, "scope": "layer"}) for name in _SCORED},
    # As published, as far as livevlm has it: see the policies for what is left out.
    "livevlm": Preset(
        {
            "policy": "vision_sink",
            "scope": "layer",
            "recent_frames": 2,
            "retrieval": "mean_key",
            "retrieval_pass": "two_pass",
            "positions": "packed",
        }
    ),
    "infinipot-v": Preset(
        {"policy": "similarity", "scope": "layer", "alpha": 0.5, "retrieval": "none", "positions": "original"}
    ),
    "streammem": Preset({"policy": "proxy_query", "scope": "layer", "retrieval": "none", "positions": "original"}),
    "rekv": Preset(
        {"policy": "full", "retrieval": "frame", "retrieval_pass": "two_pass", "positions": "packed"},
        share_of="retrieved",
    ),
}
_LAST = {"pooling": "softmax", "retrieval_queries": "last"}
_WAYS: dict[str, dict[str, Any]] = {
    "mass": {"retrieval": "mass"},
    "mass-all": {"retrieval": "mass", "retrieval_queries": "all"},
    **{name: {"retrieval": name} for name in ("mean_key", "frame")},
    **{f"{name}-softmax": {"retrieval": name, "pooling": "softmax"} for name in ("mean_key", "frame")},
    **{f"{name}-last": {"retrieval": name, **_LAST} for name in ("mean_key", "frame")},
}
RETRIEVALS: dict[str, dict[str, Any]] = {
    "none": {"retrieval": "none"},
    **{name + end: way for name, way in _WAYS.items() for end in ("", QUARTER)},
}


@dataclass(frozen=True)
class Setting:
    """One row of the comparison, for videos of any length.

    Attributes:
        budget: percent of the tokens of the whole stream; None where there is none to choose.
    """

    preset: str
    retrieval: str
    positions: str
    budget: float | None

    @property
    def name(self) -> str:
        return self.preset if self.retrieval == "none" else f"{self.preset} + {self.retrieval}"

    @property
    def rank(self) -> tuple[int, int, str, float]:
        """Where it stands in a table."""
        return (
            list(PRESETS).index(self.preset),
            list(RETRIEVALS).index(self.retrieval),
            self.positions,
            -(self.budget or 0),
        )

    def config(self, num_frames: int, tokens_per_frame: int, *, clip_frames: int, seed: int) -> Config:
        """Settings of a stream of that length.

        Raises:
            ConfigError: the budget does not hold the newest frames, which are always kept.
        """
        preset, total = PRESETS[self.preset], num_frames * tokens_per_frame
        given: dict[str, Any] = {
            "clip_frames": clip_frames,
            "slack": 0,  # compressed after every clip: what a question sees is the budget, exactly
            "positions": self.positions,
            "policy_seed": seed,
            "graphs": "off",  # captured anew for every stream, they would only cost time
            **RETRIEVALS[self.retrieval],
            **preset.settings,
        }
        tokens = total if self.budget is None else max(1, round(self.budget / 100 * total))
        if self.preset == "blind":
            tokens = tokens_per_frame
        newest = given.get("recent_frames", Config.recent_frames)
        kept = tokens if preset.share_of == "kept" else total
        ratio, frames = RETRIEVED, kept / tokens_per_frame
        if self.retrieval.endswith(QUARTER):
            ratio = (frames / 4 - newest) / max(frames - newest, 1)
            if ratio <= 0:
                raise ConfigError(f"{self.name}: a quarter of {kept} tokens: only the newest {newest} frame(s)")
        retrieved = max(1, math.ceil(ratio * (frames - newest) - 1e-6))  # as `Retrieval` counts
        if preset.share_of == "retrieved":
            retrieved, kept = tokens // tokens_per_frame - newest, total
        if tokens < newest * tokens_per_frame or retrieved < 1:
            raise ConfigError(f"{self.name}: {tokens} tokens do not hold the newest {newest} frame(s), and more")
        return Config(**{"retrieval_ratio": ratio, **given, "budget": tokens, "num_retrieved_frames": retrieved})


def settings_of(
    presets: Iterable[str], budgets: Sequence[float], retrievals: Sequence[str], positions: Sequence[str]
) -> list[Setting]:
    """All combinations that differ.

    Raises:
        ConfigError: an unknown name, or a budget that is not above 0 and at most 100.
    """
    known = ((presets, PRESETS, "settings"), (retrievals, RETRIEVALS, "retrieval"))
    for names, allowed, what in (*known, (positions, get_args(Positions), "positions")):
        for name in names:
            if name not in allowed:
                raise ConfigError(f"{what} {name!r}: allowed are {', '.join(allowed)}")
    for budget in budgets:
        if not 0 < budget <= 100:
            raise ConfigError(f"budget {budget} must be above 0 and at most 100 percent")
    found = {}
    for name in presets:
        preset = PRESETS[name]
        for retrieval in ["none"] if "retrieval" in preset.settings else retrievals:
            for place in [preset.settings["positions"]] if "positions" in preset.settings else positions:
                shares: Sequence[float | None] = [None] if preset.share_of is None else budgets
                for share in shares:
                    found[Setting(name, retrieval, place, share)] = True
    return list(found)
