# SPDX-License-Identifier: Apache-2.0
"""Generate synthetic videos, and ask questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from livevlm.synthetic.events import Events, draw_events
from livevlm.synthetic.questions import Question, draw_questions
from livevlm.synthetic.render import render
from livevlm.synthetic.vocabulary import ALL_KINDS, CELLS, COLOURS, KINDS, SHAPES

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class SyntheticVideo:
    """A generated video and everything there is to know about it."""

    frames: torch.Tensor
    """uint8 [F, 3, 112, 112]: RGB."""
    events: Events
    """What is in the video, on the CPU, without a batch dimension."""
    fps: float = 1.0
    """Frames a second the video is meant to be played at."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frames)

    def visible(self, frame: int) -> dict[str, tuple[str, str]]:
        """Return what frame ``frame`` (from 0) shows: cell -> (colour, shape), without the empty cells.

        Raises ValueError if there is no such frame.
        """
        _check_integer("frame", frame, 0, len(self) - 1)
        return {
            name: (COLOURS[int(self.events.colour[event])], SHAPES[int(self.events.shape[event])])
            for name, event in zip(CELLS, self.events.occupant[frame].tolist(), strict=True)
            if event >= 0
        }

    def questions(
        self,
        count: int,
        *,
        seed: int,
        at: int | Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> list[Question]:
        """Draw ``count`` questions; the same arguments always give the same questions.

        at: how many frames have been seen when the questions are asked, 1 to F: one number for all of them,
            or one for each.  None asks all of them at the end.
        kinds: the kinds to draw from (see ``ALL_KINDS``), each as likely as the others.  None is the eight of
            ``KINDS``.  A kind that cannot be asked yet is replaced by a "now" question if ``kinds`` has one,
            otherwise by another of ``kinds``.

        Raises ValueError for a bad argument, or if no question of ``kinds`` can be asked at that moment.
        """
        _check_integer("count", count, 1, None)
        _check_integer("seed", seed, 0, MAX_SEED)
        if at is None or isinstance(at, int):
            asked = [len(self) if at is None else at] * count
        else:
            asked = list(at)
            if len(asked) != count:
                raise ValueError(f"at has {len(asked)} entries: must have one for each of {count} questions")
        for frames_seen in asked:
            _check_integer("at", frames_seen, 1, len(self))
        return draw_questions(self.events, asked, _check_kinds(kinds), torch.Generator().manual_seed(seed))


def generate(
    num_frames: int,
    *,
    seed: int,
    num_videos: int = 1,
    device: str | torch.device = "cpu",
    kinds: Sequence[str] | None = None,
) -> list[SyntheticVideo]:
    """Generate videos of ``num_frames`` frames each.

    The same arguments always give the same videos.  ``num_videos`` is part of what is drawn: the first of
    four videos is another video than the only one of one.  On another ``device`` the frames are made there
    and only their pixel noise differs: objects, scenes, questions and answers stay the same.

    kinds: kinds the videos are to be asked about, if that is more than the eight of ``KINDS``.  For "count"
        two pairs of shape and colour come back a few times however long the video is, for "motion" more of the
        rare objects move.  The same seed gives other videos then.

    Raises ValueError for a bad argument.
    """
    _check_integer("num_frames", num_frames, 1, None)
    _check_integer("num_videos", num_videos, 1, None)
    _check_integer("seed", seed, 0, MAX_SEED)
    target = torch.device(device)
    rng = torch.Generator().manual_seed(seed)
    noise_rng = rng if target.type == "cpu" else torch.Generator(device=target).manual_seed(seed)
    asked = _check_kinds(kinds)
    events = draw_events(num_videos, num_frames, rng, repeats="count" in asked, walks="motion" in asked)
    frames = render(events, rng, noise_rng)
    return [SyntheticVideo(frames[i], events.video(i)) for i in range(num_videos)]


def _check_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    chosen = KINDS if kinds is None else tuple(kinds)
    if not chosen or isinstance(kinds, str) or not set(chosen) <= set(ALL_KINDS):
        raise ValueError(f"kinds={kinds!r}: must be a sequence of one or more of {', '.join(ALL_KINDS)}")
    return chosen


def _check_integer(name: str, value: int, low: int, high: int | None) -> None:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high and value > high):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
