# SPDX-License-Identifier: Apache-2.0
"""How many questions about generated videos a stream answers right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import variance

from livevlm.checkpoint import Checkpoint
from livevlm.config import Config
from livevlm.stream import Stream
from livevlm.synthetic import generate


@dataclass
class Score:
    """Right answers by kind of question.

    Attributes:
        asked, right: counts by kind.
        by_video: share answered right of each video's questions.
        kept: video tokens kept at the end of a stream, the largest of all videos.
        seen: video tokens of a stream.
        ms_per_frame: time to read a frame, compression included.
    """

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    by_video: list[float] = field(default_factory=list)
    kept: int = 0
    seen: int = 0
    ms_per_frame: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of all questions answered right."""
        return self.right.total() / max(1, self.asked.total())

    @property
    def variance_between_videos(self) -> float:
        """Sample variance of the videos' accuracies; 0 for fewer than two videos."""
        return variance(self.by_video) if len(self.by_video) > 1 else 0.0

    def by_kind(self) -> dict[str, float]:
        return {kind: self.right[kind] / count for kind, count in sorted(self.asked.items())}


def answer_synthetic(
    checkpoint: Checkpoint,
    config: Config,
    *,
    num_videos: int,
    num_frames: int,
    num_questions: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    progress: Callable[[], None] | None = None,
) -> Score:
    """Streams generated videos, each asked `num_questions` questions at its end.

    Args:
        checkpoint: a model that knows the synthetic vocabulary, such as `livevlm.load("tiny")`.
        config: settings of every stream; `clip_frames` frames are pushed at a time.
        seed: of videos and questions; the same seed gives the same ones for every config.
        kinds: of questions; None is the eight that the embedded checkpoint knows. Videos are made for them.
        progress: called after every video.
    """
    score, seconds = Score(), 0.0
    for index, video in enumerate(generate(num_frames, seed=seed, num_videos=num_videos, kinds=kinds)):
        stream = Stream(checkpoint.model, checkpoint.processor, config)
        stream.push(video.frames)
        right = 0
        for question in video.questions(num_questions, seed=seed + index, kinds=kinds):
            answer = stream.ask(question.text, num_evidence=0, max_new_tokens=2)
            score.asked[question.kind] += 1
            score.right[question.kind] += answer == question.answer
            right += answer == question.answer
        score.by_video.append(right / num_questions)
        stats = stream.stats()
        score.kept, score.seen = max(score.kept, stats.num_video_tokens), stats.num_seen_tokens
        seconds += stats.encode_seconds
        if progress is not None:
            progress()
    score.ms_per_frame = 1e3 * seconds / (num_videos * num_frames)
    return score
