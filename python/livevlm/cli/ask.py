# SPDX-License-Identifier: Apache-2.0
"""`livevlm ask`: questions about a video, asked at its end or while it runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args

import click

from livevlm.cli.values import TimeType, budget_settings
from livevlm.errors import ConfigError, LiveVLMError
from livevlm.types import Drop, PolicyName, RetrievalName


class OneLineError(click.ClickException):
    exit_code = 2


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the library's errors into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (LiveVLMError, RuntimeError) as error:
            # By name: importing torch takes seconds, and --help needs none.
            if not isinstance(error, LiveVLMError) and type(error).__name__ != "OutOfMemoryError":
                raise
            raise OneLineError(" ".join(str(error).split())) from None

    return run


CHECKPOINTS = "[default: the checkpoint's]"
MODEL = click.option(
    "--model",
    "name",
    default="tiny",
    show_default=True,
    metavar="PATH|tiny",
    help="Checkpoint: a folder, a hub name, or the embedded tiny model.",
)
POLICY = click.option(
    "--policy",
    type=click.Choice(get_args(PolicyName)),
    help=f"How the memory is kept within its budget.  {CHECKPOINTS}",
)
RETRIEVAL = click.option(
    "--retrieval",
    type=click.Choice(get_args(RetrievalName)),
    help=f"What a question attends to.  {CHECKPOINTS}",
)


@click.command()
@click.argument("video")
@click.argument("questions", nargs=-1, metavar="QUESTION...")
@click.option(
    "--at",
    "timed",
    type=(TimeType(), str),
    multiple=True,
    metavar="TIME QUESTION",
    help="Ask in mid-stream, e.g. --at 00:42 'what is on the table?'. May be repeated.",
)
@MODEL
@POLICY
@click.option(
    "--budget",
    metavar="N|P%|SIZE",
    help=f"Memory: tokens (12000), share of the video (25%), bytes (2GiB).  {CHECKPOINTS}",
)
@RETRIEVAL
@click.option("--fps", type=float, default=1.0, show_default=True, help="Frames a second that are looked at.")
@click.option("--for", "seconds", type=TimeType(), help="Stop watching after this time (for cameras).")
@click.option(
    "--max-delay",
    type=click.FloatRange(min=0),
    help="Seconds after which frames are read although their clip is not full.  [default: 0.5 for cameras]",
)
@click.option(
    "--drop",
    type=click.Choice(get_args(Drop)),
    help="Frames to leave out when they come faster than they are read.  [default: never, oldest for cameras]",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def ask(
    video: str,
    questions: tuple[str, ...],
    timed: tuple[tuple[float, str], ...],
    name: str,
    policy: str | None,
    budget: str | None,
    retrieval: str | None,
    fps: float,
    seconds: float | None,
    max_delay: float | None,
    drop: Drop | None,
    device: str,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """Watch VIDEO as a stream and answer each QUESTION about it.

    VIDEO is a file, a camera number, or an address such as rtsp://... Each answer comes with the times of the frames
    it rests on. Questions leave the memory as it was, so their order does not matter.
    """
    if not questions and not timed:
        raise click.UsageError("ask at least one QUESTION, or use --at TIME QUESTION")
    from livevlm.cli import watch  # takes seconds to import: not needed for --help
    from livevlm.video import open_video

    with open_video(video, fps=fps) as reader:
        checkpoint = watch.load_quietly(name, device)
        overrides = {"policy": policy, "retrieval": retrieval, "max_new_tokens": max_new_tokens}
        settings: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
        if not reader.is_live:
            settings["slack"] = 0.0  # a file is in no hurry: not a token more than the budget
        if budget is not None:
            settings |= budget_settings(budget, watch.num_video_tokens(reader, checkpoint))
            if settings.get("policy", checkpoint.config.policy) == "full":
                raise ConfigError("policy 'full' keeps everything: give it no --budget")
        session = watch.Session(
            checkpoint, settings, reader, stop_at=seconds, quiet=as_json, max_delay=max_delay, drop=drop
        )
        answers = session.run(questions, timed)
    if as_json:
        result = {
            "video": video,
            "model": name,
            "config": asdict(session.stream.config),
            "answers": answers,
            "stats": asdict(session.stream.stats()),
        }
        click.echo(json.dumps(result, indent=2))
