# SPDX-License-Identifier: Apache-2.0
"""Train a tiny LLaVA-OneVision checkpoint on synthetic videos, from nothing, in one run of about ten minutes.

    python examples/train_tiny/train.py --minutes 8 --seed 0 --out my-tiny      # one H100
    python examples/train_tiny/train.py --steps 5 --frames 16 --questions 8 --longest 4 --warm-steps 2 --out /tmp/tiny

The second line is a trial on any machine. The folder gets the newest weights every minute. Ctrl-C ends the training
early: weights are saved and evaluated as at its end.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import livevlm
from batches import Batches, shape_of
from card import write_card
from evaluate import evaluate
from folder import build_model, save
from graphs import GraphedSteps
from learner import LEARNING_RATE, Learner
from livevlm.synthetic import ALL_KINDS, KINDS
from schedule import Schedule

LOG_SECONDS = 5.0
SAVE_SECONDS = 60.0
WARM_FRAMES = 256
"""Frames of a step of the vision warm-up."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda name: Path(name).resolve(), required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=8.0, help="from start to last step; evaluation follows")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead, whatever the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--frames", type=int, default=1024, help="frames a step")
    parser.add_argument("--questions", type=int, default=1024, help="questions a step")
    parser.add_argument("--longest", type=int, default=1024, help="frames of the longest video")
    parser.add_argument("--gaps", type=float, default=0.15, help="share of short videos with gaps between positions")
    parser.add_argument("--warm-steps", type=int, default=300, help="steps of the vision warm-up")
    parser.add_argument("--old-kinds", action="store_true", help="only the kinds the embedded checkpoint knows")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--eval-videos", type=int, default=64, help="videos of each length asked about at the end")
    return parser.parse_args(arguments)


class Log:
    """JSON lines in the folder, and the same on the terminal."""

    def __init__(self, folder: Path, start: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.start = folder / "log.jsonl", start
        self.path.write_text("", encoding="utf-8")

    def __call__(self, **values: Any) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"seconds": round(time.monotonic() - self.start, 1), **rounded})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def warm_up(learner: Learner, batches: Batches, steps: int, num_frames: int, log: Log) -> None:
    """Teaches the vision tower what shapes and colours are, on frames crowded with them."""
    optimizer = learner.vision_optimizer()
    ramp = max(1, min(60, steps // 4))
    for step in range(steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / ramp, (steps - step) / ramp)
        optimizer.param_groups[0]["lr"].fill_(rate)
        learner.warm_up(*batches.dense(num_frames), optimizer)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            read = learner.read()
            log(warm_up=step + 1, **{k: read[k] for k in ("label_loss", "shape_right", "colour_right")})


def train(options: argparse.Namespace, learner: Learner, start: float, log: Log) -> int:
    """Returns the number of steps taken. Saves every minute, and at the end whatever ends it."""
    device = learner.device
    batches = Batches(device, options.seed, KINDS if options.old_kinds else ALL_KINDS)
    schedule = Schedule(longest=options.longest, gaps=options.gaps)
    warm_up(learner, batches, options.warm_steps, min(WARM_FRAMES, options.frames), log)
    graphed = GraphedSteps(learner) if device.type == "cuda" and not options.eager else None

    begin = logged = saved = time.monotonic()
    seconds = max(1.0, start + 60 * options.minutes - begin)
    step = last = 0
    try:
        while True:
            now = time.monotonic()
            progress = step / options.steps if options.steps else (now - begin) / seconds
            if progress >= 1:
                break
            lengths = schedule.lengths(progress)
            length = lengths[int(batches.chance() * len(lengths))]
            shape = shape_of(length, options.frames, options.questions)
            batch = batches.draw(shape, schedule.gap_share(progress))
            learner.set_rate(schedule.learning_rate(progress, step))
            learner.label_weight.fill_(schedule.label_weight(progress))
            if graphed is None:
                learner.step(batch)
            else:
                graphed(shape, batch)
            step += 1
            if now - logged > LOG_SECONDS:
                read = learner.read()
                right = {kind: round(share, 3) for kind, share in read.pop("right").items()}
                rate = (step - last) / (time.monotonic() - logged)
                log(step=step, progress=progress, lengths=lengths, **read, right=right, steps_a_second=rate)
                if not read["loss"] < 100:
                    raise FloatingPointError(f"loss is {read['loss']} at step {step}; the weights on disk are older")
                logged, last = time.monotonic(), step
            if now - saved > SAVE_SECONDS:
                save(learner.model, options.out)
                saved = time.monotonic()
    except KeyboardInterrupt:
        log(interrupted=True, step=step)
    save(learner.model, options.out)
    return step


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saves, as Ctrl-C does
    device = livevlm.checkpoint.find_device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each length, and again inside of a graph
    transformers.utils.logging.disable_progress_bar()
    log = Log(options.out, start)
    learner = Learner(build_model(), device)
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    log(parameters=parameters, device=str(device), gpu=gpu, torch=torch.__version__)
    steps = train(options, learner, start, log)
    given = sys.argv[1:] if arguments is None else arguments
    facts = {
        "command": " ".join(["python examples/train_tiny/train.py", *given]),
        "seed": options.seed,
        "steps": steps,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "kinds": list(KINDS if options.old_kinds else ALL_KINDS),
        "longest": options.longest,
        "gaps": options.gaps,
        "parameters": parameters,
        "gpu": gpu,
        "gpu_memory_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1) if device.type == "cuda" else 0,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "livevlm": livevlm.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    log(saved=str(options.out), **facts)
    torch.set_float32_matmul_precision("highest")
    evaluate(options.out, device, videos=options.eval_videos, longest=options.longest)
    write_card(options.out)
    log(done=True)


if __name__ == "__main__":
    main()
