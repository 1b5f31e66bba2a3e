# SPDX-License-Identifier: Apache-2.0
"""Answers of the embedded checkpoint under every policy, at a quarter of the video's tokens.

    python bench/answers.py [--videos 64] [--frames 64] [--only full] [--out bench/results/answers_tiny.csv]

64 generated videos of 64 frames, 16 questions each at the end, compressed while they stream (8 frames at a time). All
rows see the same videos and questions. Questions about one video are correlated, so the 95 % interval (`ci95`, plus or
minus) comes from the spread of the videos' own accuracies. The table of the checkpoint's model card is
`--frames 32 64 128 256 --only full --out bench/results/checkpoint_tiny.csv`.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress

import livevlm
from livevlm import Config
from livevlm.evaluation import answer_synthetic
from livevlm.synthetic import KINDS, TOKENS_PER_FRAME

QUESTIONS = 16
ROWS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "similarity": {"policy": "similarity"},
    "similarity, shared": {"policy": "similarity", "scope": "shared"},
    "vision_sink": {"policy": "vision_sink"},
    "vision_sink, shared": {"policy": "vision_sink", "scope": "shared"},
    "clip_merge": {"policy": "clip_merge"},
    "clip_merge, shared": {"policy": "clip_merge", "scope": "shared"},
    "uniform": {"policy": "uniform"},
    "recent": {"policy": "recent"},
    "full + mean_key 40%": {"policy": "full", "retrieval": "mean_key"},
    "full + mean_key 40%, softmax": {"policy": "full", "retrieval": "mean_key", "pooling": "softmax"},
    "full + frame 24": {"policy": "full", "retrieval": "frame", "num_retrieved_frames": 24},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--frames", type=int, nargs="+", default=[64])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="SETTING")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "answers_tiny.csv")
    options = parser.parse_args()

    torch.set_num_threads(1)  # the model is small: a second thread only waits
    checkpoint = livevlm.load("tiny", device=options.device)
    rows = []
    with Progress() as progress:
        runs = [(name, frames) for name in options.only for frames in options.frames]
        task = progress.add_task("answers", total=len(runs) * options.videos)
        for name, frames in runs:
            budget = frames * TOKENS_PER_FRAME // 4
            config = Config(**{"budget": budget, "clip_frames": 8, "retrieval": "none", **ROWS[name]})
            score = answer_synthetic(
                checkpoint,
                config,
                num_videos=options.videos,
                num_frames=frames,
                num_questions=QUESTIONS,
                seed=options.seed,
                progress=lambda: progress.advance(task),
            )
            accuracy = score.accuracy
            rows.append(
                {
                    "setting": name,
                    "accuracy": f"{accuracy:.4f}",
                    "ci95": f"{1.96 * math.sqrt(score.variance_between_videos / options.videos):.4f}",
                    "tokens_kept": score.kept,
                    "tokens_seen": score.seen,
                    "ms_per_frame": f"{score.ms_per_frame:.2f}",
                    **{kind: f"{score.by_kind().get(kind, math.nan):.4f}" for kind in KINDS},
                    "videos": options.videos,
                    "frames": frames,
                    "questions": QUESTIONS,
                    "seed": options.seed,
                    "device": options.device,
                    "machine": platform.machine(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "livevlm": livevlm.__version__,
                }
            )
            progress.console.print(
                f"{name:<30} {frames:>4} frames  {accuracy:.3f}  {score.kept} of {score.seen} tokens"
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
