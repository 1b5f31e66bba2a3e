# SPDX-License-Identifier: Apache-2.0
"""`livevlm bench`: how fast things are on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click

from livevlm.cli.bench_stream import stream

PREFIX = "bench_"


def scripts() -> dict[str, Path]:
    """The benchmark script of each op: those installed with the package, or those of the source tree it runs from."""
    spec = importlib.util.find_spec("livevlm_bench")
    installed = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in (*installed, Path(__file__).parents[3] / "bench"):
        if (folder / "kit.py").exists():
            return {path.stem.removeprefix(PREFIX): path for path in sorted(folder.glob(f"{PREFIX}*.py"))}
    raise click.ClickException("the benchmark scripts are not installed; they are in the folder bench of the sources")


@click.group(short_help="Measure how fast things are here.")
def bench() -> None:
    """Measure how fast kernels, or whole streams, are on this machine."""


@bench.command()
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), help="Folder of CSV files to update.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is one]")
def kernels(ops: tuple[str, ...], results: Path | None, device: str | None) -> None:
    """Measure the ops named, or all of them, against eager and compiled PyTorch.

    Every result is compared with the reference before it is timed. On a GPU this takes minutes, on a CPU the shapes are
    small.
    """
    found = scripts()
    unknown = [op for op in ops if op not in found]
    if unknown:
        raise click.UsageError(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(found)}")
    options = [*(["--results", str(results)] if results else []), *(["--device", device] if device else [])]
    failed = []
    for op in ops or found:
        # A process each: what one op leaves in GPU memory and compilers does not disturb the next.
        command = [sys.executable, str(found[op]), *options]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                click.echo(line, nl=False)
        if process.returncode != 0:
            failed.append(op)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


bench.add_command(stream)
