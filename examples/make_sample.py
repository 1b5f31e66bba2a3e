# SPDX-License-Identifier: Apache-2.0
"""Make ``sample.mp4`` and ``sample.json``: a minute of synthetic video, and questions with true answers.

Needs PyAV to encode (``pip install av``).  Run it from anywhere: ``python examples/make_sample.py``.

The seed was chosen so that the evidence is spread over the minute and the small checkpoint, keeping its whole
cache, answers every question.  That makes the sample good to try things on, and useless as a measurement.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F

from livevlm.synthetic import Question, SyntheticVideo, generate

SEED = 29
NUM_FRAMES = 64
"""Generated frames; each is shown for one second."""
FPS = 8
"""Frames a second of the file: a player needs more than one to seek well."""
SIZE = 448
"""Height and width of the file in pixels."""
KINDS_AT_END = (
    "recall_colour", "recall_shape", "where", "exist", "exist", "before", "after", "now_shape", "now_colour",
)  # fmt: skip
RECENT = 6
"""Questions about the past are about objects that were last seen longer ago than this, in seconds."""
ASKED_ON_THE_WAY = ((20, "recall_colour"), (32, "where"), (45, "before"))
"""(second, kind) of the questions asked before the end."""


def write_video(frames: torch.Tensor, path: Path) -> None:
    """Write uint8 [F, 3, H, W] RGB frames as H.264, one second each."""
    large = F.interpolate(frames, size=(SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        stream.options = {"crf": "36", "preset": "veryslow", "g": str(16 * FPS), "threads": "1"}
        for index in range(len(large) * FPS):
            picture = av.VideoFrame.from_ndarray(large[index // FPS], format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def choose_questions(video: SyntheticVideo, seed: int) -> list[Question]:
    """Choose questions of different kinds and answers, with old and less old evidence in turn."""
    chosen: list[Question] = []
    wanted = [*ASKED_ON_THE_WAY, *((len(video), kind) for kind in KINDS_AT_END)]
    for turn, (second, kind) in enumerate(wanted):
        answers = {question.answer for question in chosen if question.kind == kind}
        cells = {question.text for question in chosen if question.kind == "now_shape"}
        candidates = [
            question
            for question in video.questions(32, seed=seed + turn, at=second, kinds=[kind])
            if question.answer not in answers | {"nothing"}
            and question.text.replace("colour", "shape") not in cells
            and (question.evidence_frame is None or question.evidence_frame < second - RECENT)
            and _stands_a_frame_later(video, question)
        ]
        if not candidates:
            raise ValueError(f"seed={seed}: no suitable {kind!r} question at {second} s")
        candidates.sort(key=lambda question: (question.evidence_frame or 0, question.text))
        chosen.append(candidates[(0, len(candidates) // 2, -1)[turn % 3]])
    return chosen


def _stands_a_frame_later(video: SyntheticVideo, question: Question) -> bool:
    """Whether the answer is the same if the frame shown at that very second has been seen too."""
    if question.frame == len(video):
        return True
    later = video.questions(256, seed=0, at=question.frame + 1, kinds=[question.kind])
    return (question.text, question.answer) in {(other.text, other.answer) for other in later}


def clock(seconds: int) -> str:
    """Return ``"mm:ss"``."""
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def main() -> None:
    """Write both files beside this script."""
    folder = Path(__file__).parent
    video = generate(NUM_FRAMES, seed=SEED)[0]
    write_video(video.frames, folder / "sample.mp4")
    questions = [
        {
            "time": clock(question.frame),
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "evidence": None if question.evidence_frame is None else clock(question.evidence_frame),
        }
        for question in choose_questions(video, SEED)
    ]
    sample = {"video": "sample.mp4", "fps": 1, "seconds": NUM_FRAMES, "seed": SEED, "questions": questions}
    (folder / "sample.json").write_text(json.dumps(sample, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
