# SPDX-License-Identifier: Apache-2.0
"""`livevlm eval synthetic`: answers about generated videos, under every memory."""

from __future__ import annotations

from pathlib import Path

import click

from livevlm.cli.ask import one_line_errors
from livevlm.config import Config
from livevlm.errors import ConfigError


def _names(text: str) -> list[str]:
    """Words divided by commas."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(part.rstrip("% ")) for part in _names(text)]
    except ValueError:
        raise ConfigError(f"{what} {text!r}: allowed are numbers, divided by commas") from None


@click.command()
@click.option("--settings", default="all", show_default=True, help="Memories to compare, divided by commas.")
@click.option("--budgets", default="50,25,10,5", show_default=True, help="Percent of a stream's tokens.")
@click.option("--frames", default="64", show_default=True, help="Lengths of streams, 32 to 1024 say.")
@click.option("--retrieval", default="none", show_default=True, help="What questions attend to.")
@click.option("--positions", default=Config.positions, show_default=True, help="spread, original, packed, or several.")
@click.option("--streams", type=click.IntRange(min=1), default=64, show_default=True, help="Videos of each length.")
@click.option("--questions", type=click.IntRange(min=1), default=16, show_default=True, help="In each stream.")
@click.option("--moments", type=click.IntRange(min=1), default=4, show_default=True, help="At which they are asked.")
@click.option("--clip-frames", type=click.IntRange(min=1), default=8, show_default=True, help="Frames read at once.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Other videos for each.")
@click.option("--model", default="tiny", show_default=True, metavar="PATH|tiny", help="Trained on these videos.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="One thread each.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("eval_synthetic"),
    show_default=True,
    help="Folder of results. A run that was stopped goes on there, and others add to it.",
)
@click.option("--plots/--no-plots", default=True, help="Draw them, with matplotlib.  [default: yes]")
@one_line_errors
def synthetic(
    settings: str,
    budgets: str,
    frames: str,
    retrieval: str,
    positions: str,
    streams: int,
    questions: int,
    moments: int,
    clip_frames: int,
    seed: int,
    model: str,
    device: str,
    processes: int,
    out: Path,
    plots: bool,
) -> None:
    """Compare memories by the answers they leave to the embedded checkpoint.

    Streams are read clip by clip and compressed as they come; questions are asked at random moments of the second half
    and at the end. Every setting sees the same videos, clips and questions. A budget is a share of the tokens of the
    whole stream, and no more than that is kept after any clip.

    \b
    settings   full, blind (the newest frame), recent, uniform, random,
               novelty, similarity, vision_sink, clip_merge, proxy_query:
               the same tokens in all layers; with "-layer", each its own;
               as published: livevlm, infinipot-v, streammem, rekv
    retrieval  none, or 40 % of the blocks: mass (by the question's last
               query), mass-all (by all of them), mean_key, frame, and the
               latter two with "-softmax" (by all) or "-last" (softmax of
               the last); with "-25" behind it a quarter of the memory
    """
    from rich.console import Console  # seconds of imports: not needed for --help
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from livevlm.checkpoint import find_device
    from livevlm.cli.watch import quiet_libraries
    from livevlm.evaluating.plan import Plan
    from livevlm.evaluating.run import compare
    from livevlm.evaluating.settings import PRESETS, settings_of

    quiet_libraries()
    names = list(PRESETS) if settings == "all" else _names(settings)
    lengths = _numbers(frames, "frames")
    if not lengths or any(length != int(length) or length < 1 for length in lengths):
        raise ConfigError(f"frames {frames!r}: allowed are whole numbers, divided by commas")
    chosen = settings_of(names, _numbers(budgets, "budgets"), _names(retrieval), _names(positions))
    plan = Plan(
        tuple(chosen),
        tuple(map(int, lengths)),
        streams=streams,
        questions=questions,
        moments=moments,
        clip_frames=clip_frames,
        seed=seed,
        model=model,
        device=str(find_device(device)),
    )
    err = Console(stderr=True, highlight=False)
    columns = (TextColumn("watching"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("")
        result = compare(
            plan,
            out,
            processes=processes,
            plots=plots,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for why in result.left_out:
        err.print(f"left out: {why}")
    click.echo((out / "results.md").read_text())
    click.echo("\n".join(f"wrote {path}" for path in result.files))
