# SPDX-License-Identifier: Apache-2.0
"""The protocol: which videos, when they are asked what, and what is the same for every memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from livevlm.errors import ConfigError
from livevlm.evaluating.settings import Setting
from livevlm.synthetic import Question, SyntheticVideo, generate

MOST_STREAMS = 100_000


@dataclass(frozen=True)
class Plan:
    """One comparison.

    A stream is watched in clips of `clip_frames` frames. At `moments` places, at random in its second half, the last of
    them its end, the clip being filled is read as it is, and questions about all seen so far are asked. All settings
    see the same videos, clips and questions.

    Attributes:
        seed: of the videos, `seed * 100,000 + index`; tests and development use videos of other seeds.
        questions: of a stream, over all its moments.
    """

    settings: tuple[Setting, ...]
    frames: tuple[int, ...] = (64,)
    streams: int = 64
    questions: int = 16
    moments: int = 4
    clip_frames: int = 8
    seed: int = 1
    model: str = "tiny"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MOST_STREAMS:
            raise ConfigError(f"streams={self.streams} must lie between 1 and {MOST_STREAMS}")
        if not 1 <= self.moments <= self.questions:
            raise ConfigError(f"moments={self.moments} must lie between 1 and the number of questions")
        for count in self.frames:
            if count < 2 * self.moments:
                raise ConfigError(f"{count} frames are too few for {self.moments} moments in their second half")

    def facts(self) -> dict[str, Any]:
        """What results depend on beside the settings, the length and the number of the video."""
        names = ("questions", "moments", "clip_frames", "seed", "model", "device")
        return {name: asdict(self)[name] for name in names}

    def video_seed(self, index: int) -> int:
        return self.seed * MOST_STREAMS + index

    def video(self, num_frames: int, index: int) -> SyntheticVideo:
        """Made on the CPU, so that it is the same for every device."""
        return generate(num_frames, seed=self.video_seed(index))[0]

    def times(self, num_frames: int, index: int) -> list[int]:
        """How many frames have been seen at each moment, growing."""
        rng = torch.Generator().manual_seed(self.video_seed(index))
        half = num_frames // 2
        early = torch.randperm(num_frames - half, generator=rng)[: self.moments - 1] + half
        return [*sorted(early.tolist()), num_frames]

    def questions_of(self, video: SyntheticVideo, index: int) -> list[Question]:
        """In the order in which they are asked, equally many at each moment if they can be shared out."""
        times = self.times(len(video), index)
        at = sorted(times[i % len(times)] for i in range(self.questions))
        return video.questions(self.questions, at=at, seed=self.video_seed(index))
