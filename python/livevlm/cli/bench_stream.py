# SPDX-License-Identifier: Apache-2.0
"""`livevlm bench stream`: a whole stream, beside stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from livevlm.cli.ask import one_line_errors
from livevlm.cli.values import budget_settings
from livevlm.errors import ConfigError
from livevlm.types import RetrievalName

PARTS = ("floor", "encode", "live", "retrieval", "kept", "oneshot", "file", "profile")
DEFAULT_FRAMES = {"cuda": 22_528, "cpu": 256}


def chosen_parts(text: str) -> list[str]:
    """Names of parts, divided by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise ConfigError(f"parts {text!r}: allowed are {', '.join(PARTS)}, divided by commas")
    return names


@click.command()
@click.option(
    "--shape",
    type=click.Choice(["7b", "0.5b", "tiny"]),
    help="Size of the model; 7b and 0.5b have random weights.  [default: 7b on a GPU, else tiny]",
)
@click.option("--model", metavar="PATH", help="A checkpoint, in the place of a shape.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--frames", type=click.IntRange(min=1), help="Length of the stream.  [default: 22528 on a GPU, else 256]")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="What to measure, divided by commas.")
@click.option("--limit", type=float, default=240.0, show_default=True, help="Seconds for each part.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Samples of each figure.")
@click.option("--budget", metavar="N|SIZE", help="Memory of livevlm: tokens, or bytes (2GiB).")
@click.option(
    "--retrieval",
    type=click.Choice(get_args(RetrievalName)),
    help="What questions to livevlm attend to.  [default: the checkpoint's setting]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench_stream"),
    show_default=True,
    help="Folder of results: JSON, CSV and plots. A part that is measured again replaces its old rows.",
)
@click.option("--plots/--no-plots", default=True, help="Draw them, with matplotlib.  [default: yes]")
@one_line_errors
def stream(
    shape: str | None,
    model: str | None,
    device: str,
    frames: int | None,
    parts: str,
    limit: float,
    repeats: int,
    budget: str | None,
    retrieval: RetrievalName | None,
    out: Path,
    plots: bool,
) -> None:
    """Measure livevlm beside stock transformers: reading, TTFT, decoding and memory, over a growing history.

    \b
    floor    one read of the weights, which no token is decoded faster than
    encode   ms a frame at 1, 8 and 32 frames a call
    live     livevlm: the whole stream, questions on the way
    retrieval  questions to a full memory, by what they attend to
    kept     stock, in clips, everything kept: until it is out of memory
    oneshot  stock, video and question at once: until it is out of memory
    file     a real file, decoding included
    profile  where each millisecond goes (GPU only)
    """
    names = chosen_parts(parts)
    if shape is not None and model is not None:
        raise ConfigError("give --shape or --model, not both")
    from rich.console import Console  # seconds of imports: not needed for --help

    from livevlm.benchmark.parts import Plan
    from livevlm.benchmark.run import run
    from livevlm.benchmark.subject import subject_for
    from livevlm.checkpoint import find_device
    from livevlm.cli.watch import quiet_libraries, set_threads

    quiet_libraries()
    kind = find_device(device).type
    settings = {} if budget is None else budget_settings(budget, None)
    settings |= {} if retrieval is None else {"retrieval": retrieval}
    subject = subject_for(shape or ("7b" if kind == "cuda" else "tiny"), model, str(find_device(device)))
    set_threads(subject.model)
    plan = Plan(frames or DEFAULT_FRAMES[kind], repeats=repeats, settings=tuple(settings.items()))
    err = Console(stderr=True, highlight=False)
    with err.status("measuring") as status:
        files = run(
            subject,
            plan,
            names,
            folder=out,
            limit=limit,
            draw=plots,
            tell=lambda part: status.update(f"measuring {part}"),
            show=lambda row: click.echo(row.line()),
        )
    click.echo("\n".join(f"wrote {path}" for path in files))
