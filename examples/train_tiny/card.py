# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md beside the weights, from `training.json` and `eval.json` in the same folder.

python examples/train_tiny/card.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from livevlm.synthetic import CHANCE, TEMPLATES

CARD = """# A tiny LLaVA-OneVision for streaming video

A LLaVA-OneVision model of {millions:.2f} million parameters, trained from scratch on synthetic videos, so that the
answer quality of a streaming memory can be measured on any machine in seconds. It knows {words} words and nothing about
the real world. Licence: Apache-2.0.

## What it is

`LlavaOnevisionForConditionalGeneration` with nothing patched; load it with `livevlm.load(folder)` or
`from_pretrained`. The weights are stored in bfloat16 ({megabytes:.1f} MB). On a CPU load them as float32, which is
several times faster there.

| part | size |
|---|---|
| vision tower (SigLIP) | {vision_layers} layers, width {vision_width}; {size}x{size} pixels in {patch}-pixel patches |
| projector and pooling | to width {width}; 16 tokens a frame, one for each cell of a 4x4 grid |
| language model (Qwen2) | {layers} layers, width {width}, {heads} query heads and {kv_heads} key-value heads |

Frames are RGB, normalised with mean 0.5 and standard deviation 0.5. One `image_newline` follows the last frame.

## What it was trained on

Videos and questions of `livevlm.synthetic` (livevlm {livevlm}): coloured shapes that come, move and go over a textured
background with scene changes and camera noise. First the vision tower on single frames crowded with objects, then
everything on videos that grow from 2 to {longest} frames, asked at any moment. {gaps}
{steps} steps in {minutes} minutes in all, seed {seed}, on {gpu}; torch {torch}, transformers {transformers}.

The questions it knows, in these words only:

{templates}

## Measured accuracy

With its full cache, in float32, on videos it has not seen (seed {eval_seed}), {questions} questions a video, all asked
at the end. The interval is 95 % of the spread between videos. The first row is a uniform guess.

{tables}

Streamed by livevlm itself on a CPU, {streamed_videos} videos of {streamed_frames} frames, all kinds: {streamed:.3f}.

Not measured here: answers under eviction and retrieval, in bfloat16, of another seed.

## Limits

- It answers the questions above in their exact words, and nothing else.
- It was trained on up to {longest} frames at a time; lengths that are not in the table were not measured.
- The last frame alone answers the "now" questions; they say nothing about memory.
{new_kinds}- What its single layers do may differ in a model of another seed. Use it to find bugs and compare
  broad choices, not to tune settings for another model.

## Reproduce

```sh
{command}
```
Training stops by the clock, so a second run takes another number of steps and gives other weights.
"""
NEW_KINDS = """- "count" is how often a pair comes into view, up to four times; "motion" is from the first to the last
  cell where the object was seen.
"""


def table(rows: list[dict[str, Any]]) -> str:
    kinds = [kind for kind in CHANCE if any(kind in row["by_kind"] for row in rows)]
    lines = [
        "| frames | videos | all | " + " | ".join(kind.replace("_", " ") for kind in kinds) + " |",
        "|---" * (3 + len(kinds)) + "|",
        "| guess | | | " + " | ".join(f"{CHANCE[kind]:.2f}" for kind in kinds) + " |",
    ]
    for row in rows:
        shares = [f"{row['by_kind'][kind]:.2f}" if kind in row["by_kind"] else "-" for kind in kinds]
        first = f"| {row['frames']} | {row['videos']} | {row['accuracy']:.3f} ± {row['ci95']:.3f} | "
        lines.append(first + " | ".join(shares) + " |")
    return "\n".join(lines)


def write_card(folder: Path) -> None:
    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    training, evaluation, config = read("training.json"), read("eval.json"), read("config.json")
    text, vision = config["text_config"], config["vision_config"]
    gaps = "In {:.0%} of the batches of short videos frames' positions had random gaps between them."
    tables = [table(evaluation["old"])]
    if evaluation["new"]:
        tables.append("The new kinds, on videos in which some pairs come back and rare objects move:")
        tables.append(table(evaluation["new"]))
    card = CARD.format(
        **{key: training[key] for key in ("livevlm", "longest", "steps", "minutes", "seed", "torch", "transformers")},
        millions=training["parameters"] / 1e6,
        words=len(read("tokenizer.json")["model"]["vocab"]),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        vision_layers=vision["num_hidden_layers"],
        vision_width=vision["hidden_size"],
        size=vision["image_size"],
        patch=vision["patch_size"],
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        gaps=gaps.format(training["gaps"]) if training["gaps"] else "",
        gpu="a CPU" if training["gpu"] == "none" else f"one {training['gpu']}",
        templates="\n".join(f"- {kind.replace('_', ' ')}: `{TEMPLATES[kind]}`" for kind in training["kinds"]),
        eval_seed=evaluation["seed"],
        questions=evaluation["questions_a_video"],
        tables="\n\n".join(tables),
        streamed=evaluation["streamed"]["accuracy"],
        streamed_videos=evaluation["streamed"]["videos"],
        streamed_frames=evaluation["streamed"]["frames"],
        new_kinds=NEW_KINDS if evaluation["new"] else "",
        command=training["command"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
