# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint with its full cache on videos it has not seen, by kind of question and length.

    python examples/train_tiny/evaluate.py FOLDER [--frames 32 64 128 256 1024] [--videos 64]

The eight old kinds are asked about plain videos, of seeds that nothing else uses; the new kinds about
videos made for them. Writes FOLDER/eval.json. Without FOLDER: the embedded checkpoint, and the table is only printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import variance
from typing import Any

import torch

import livevlm
from livevlm import Config
from livevlm.evaluating.watching import watch
from livevlm.synthetic import ALL_KINDS, FULL_VOCAB, KINDS, NEW_KINDS, TOKENS_PER_FRAME, generate
from packed import packed_forward
from words import ID, Encoder

LENGTHS = (32, 64, 128, 256, 1024)
QUESTIONS = 16
"""Questions about each video, all at its end."""
SEED = 1000
"""Seed of the first video; training draws from other generators."""
FRAMES_AT_ONCE = 1024
"""Frames in one forward pass."""
LONG = 512
"""Of videos longer than this a quarter as many are asked about."""


@torch.no_grad()
def accuracy(
    model: Any, device: torch.device, frames: int, videos: int, kinds: Sequence[str], seed: int = SEED
) -> dict[str, Any]:
    """One row: share answered right, by kind too; +- is 95 % of the spread between videos."""
    asked, right, by_video = Counter[str](), Counter[str](), []
    encoder = Encoder(device)
    clips = generate(frames, seed=seed, num_videos=videos, device=device, kinds=kinds)
    moments = torch.full((QUESTIONS,), frames, device=device)
    frame_start = torch.arange(frames, device=device) * TOKENS_PER_FRAME
    size = max(1, FRAMES_AT_ONCE // frames)
    for begin in range(0, videos, size):
        some = clips[begin : begin + size]
        questions = [video.questions(QUESTIONS, seed=seed + begin + i, kinds=kinds) for i, video in enumerate(some)]
        pixels = torch.stack([video.frames for video in some])
        ids, answer_at = encoder.asked(questions)
        said = packed_forward(model, pixels, ids, answer_at, moments, frame_start)[0].argmax(-1).tolist()
        for video, answers in zip(questions, said, strict=True):
            hits = [question for question, word in zip(video, answers, strict=True) if word == ID[question.answer]]
            asked.update(question.kind for question in video)
            right.update(question.kind for question in hits)
            by_video.append(len(hits) / len(video))
    spread = variance(by_video) if videos > 1 else 0.0
    return {
        "frames": frames,
        "videos": videos,
        "accuracy": round(right.total() / asked.total(), 4),
        "ci95": round(1.96 * math.sqrt(spread / videos), 4),
        "by_kind": {kind: round(right[kind] / asked[kind], 4) for kind in ALL_KINDS if asked[kind]},
        "asked": {kind: asked[kind] for kind in ALL_KINDS if asked[kind]},
    }


def evaluate(
    folder: Path | str,
    device: torch.device,
    *,
    videos: int = 64,
    longest: int = LENGTHS[-1],
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Asks the checkpoint in `folder`, in float32, and writes `eval.json` into it; "tiny" is the embedded one."""
    model = livevlm.load(folder, device=device, dtype=torch.float32).model
    knows_all = model.config.text_config.vocab_size >= len(FULL_VOCAB)
    result: dict[str, Any] = {"seed": SEED, "questions_a_video": QUESTIONS, "dtype": "float32", "old": [], "new": []}
    for frames in [length for length in lengths if length <= longest] or [longest]:
        count = videos if frames <= LONG else max(1, videos // 4)
        for name, kinds in (("old", KINDS), ("new", NEW_KINDS)):
            if name == "new" and not knows_all:
                continue
            row = accuracy(model, device, frames, count, kinds)
            result[name].append(row)
            shares = " ".join(f"{kind} {share:.2f}" for kind, share in row["by_kind"].items())
            print(f"{frames:>5} frames {name}: {row['accuracy']:.3f} +- {row['ci95']:.3f} | {shares}", flush=True)
    known = ALL_KINDS if knows_all else KINDS
    result["streamed"] = streamed(folder, known, min(videos, 8), min(32, longest))
    if folder != "tiny":
        (Path(folder) / "eval.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def streamed(folder: Path | str, kinds: Sequence[str], videos: int, frames: int) -> dict[str, Any]:
    """All kinds through `livevlm.Stream` on the CPU: a look at whether the folder works as a whole."""
    config = Config(policy="full", retrieval="none", clip_frames=8)
    checkpoint = livevlm.load(folder, device="cpu")
    right = []
    for index, video in enumerate(generate(frames, seed=SEED, num_videos=videos, kinds=kinds)):
        questions = video.questions(QUESTIONS, seed=SEED + index, kinds=kinds)
        right += [answer[-1] for answer in watch(checkpoint, config, video.frames, questions)["answers"]]
    accuracy = sum(right) / len(right)
    print(f"{frames:>5} frames streamed through livevlm: {accuracy:.3f}", flush=True)
    return {"frames": frames, "videos": videos, "accuracy": round(accuracy, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="tiny")
    parser.add_argument("--frames", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = livevlm.checkpoint.find_device(options.device)
    evaluate(options.folder, device, videos=options.videos, longest=max(options.frames), lengths=options.frames)


if __name__ == "__main__":
    main()
