# SPDX-License-Identifier: Apache-2.0
"""`livevlm eval`: memories compared on generated videos; the field's benchmarks on a user's own copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from livevlm.cli.ask import CHECKPOINTS, MODEL, POLICY, RETRIEVAL, one_line_errors
from livevlm.cli.eval_synthetic import synthetic

FOLDER = click.Path(file_okay=False, path_type=Path)
TITLES = {
    "streamingbench": "StreamingBench: real-time, omni, SQA and proactive questions at their times.",
    "ovobench": "OVO-Bench: backward, real-time and forward questions at their times.",
    "rvs": "RVS-Ego and RVS-Movie: open questions at their times, decided by a judge.",
    "mlvu": "MLVU (dev, multiple choice).",
    "videomme": "VideoMME, without subtitles.",
    "egoschema": "EgoSchema; also writes a submission file.",
    "longvideobench": "LongVideoBench (validation), without subtitles.",
    "cgbench": "CG-Bench, with the share of answers that rest on its clues.",
}


@click.group("eval", short_help="How many questions are answered right.")
def evaluate() -> None:
    """Run benchmarks on your own copies: questions at their times, in one pass over each video. "synthetic" needs none:
    it compares memories on generated videos.

    Answers are kept one by one: a run that was killed goes on where it was. Under torchrun each process takes a share
    of the videos. See docs/evaluation.md.
    """


evaluate.add_command(synthetic)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every benchmark."""
    folder_in = click.Path(exists=True, file_okay=False, path_type=Path)
    file_in = click.Path(exists=True, dir_okay=False, path_type=Path)
    for option in reversed(
        (
            click.option("--data", type=folder_in, required=True, help="Folder with annotations and videos."),
            click.option("--out", type=FOLDER, required=True, help="Folder of answers and summary."),
            click.option(
                "--annotations", type=file_in, multiple=True, help="Annotation file, where it is not found by name."
            ),
            click.option("--videos", type=folder_in, multiple=True, help="More folders in which videos lie."),
            MODEL,
            POLICY,
            click.option(
                "--budget",
                metavar="N|P%|SIZE",
                help=f"Memory: tokens (12000), share of each video (25%), bytes (2GiB).  {CHECKPOINTS}",
            ),
            RETRIEVAL,
            click.option(
                "--set",
                "changes",
                multiple=True,
                metavar="NAME=VALUE",
                help="Any other setting of livevlm.Config, such as scope=shared. May be repeated.",
            ),
            click.option(
                "--fps",
                type=click.FloatRange(min=0, min_open=True),
                help="Frames a second looked at.  [default: the benchmark's]",
            ),
            click.option(
                "--stored-fps",
                type=click.FloatRange(min=0, min_open=True),
                default=1.0,
                show_default=True,
                help="Frames a second at which .npy stacks and folders of pictures were taken.",
            ),
            click.option(
                "--context",
                type=click.FloatRange(min=0, min_open=True),
                help="Show only so many seconds before each question (StreamingBench: 60).  [default: everything]",
            ),
            click.option(
                "--control/--no-control",
                default=True,
                help="Ask a second stream that keeps the newest frames in the same budget.  [default: yes]",
            ),
            click.option("--template", metavar="TEXT", help="Prompt of multiple choice, with {question}, {options}."),
            click.option("--prefix", metavar="TEXT", help="How a multiple-choice answer begins."),
            click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer to any question."),
            click.option("--judge-url", metavar="URL", help="OpenAI-compatible address, up to /v1."),
            click.option("--judge-model", metavar="NAME", help="Judge there; without an address a local checkpoint."),
            click.option(
                "--judge-key",
                metavar="VARIABLE",
                default="OPENAI_API_KEY",
                show_default=True,
                help="Environment variable with the judge's key.",
            ),
            click.option("--task", "tasks", multiple=True, help="Only this task. May be repeated."),
            click.option("--limit", type=click.IntRange(min=1), help="Only so many videos."),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ..."),
        )
    ):
        command = option(command)
    return command


def add(benchmark: str, title: str) -> None:
    @evaluate.command(benchmark, help=title, short_help=title)
    @options
    @one_line_errors
    def command(**values: Any) -> None:
        from livevlm.cli.eval_run import evaluate_benchmark  # seconds of imports: not needed for --help

        evaluate_benchmark(benchmark, **values)


for _name, _title in TITLES.items():
    add(_name, _title)


@evaluate.command(short_help="Add up the answers in a folder.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown.")
@one_line_errors
def summary(folder: Path, as_json: bool) -> None:
    """Add up the answers in FOLDER, of all processes, finished or not; writes summary.md and summary.json."""
    from livevlm.benchmarks.summary import summarize

    result, _ = summarize(folder)
    click.echo(json.dumps(result, indent=2) if as_json else (folder / "summary.md").read_text(), nl=as_json)
