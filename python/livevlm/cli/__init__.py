# SPDX-License-Identifier: Apache-2.0
"""The command line, `livevlm`. Errors are one line and exit code 2."""

from __future__ import annotations

import json

import click

from livevlm.cli.ask import ask
from livevlm.cli.bench import bench
from livevlm.cli.eval import evaluate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="livevlm")
def main() -> None:
    """Watch videos as streams with a bounded memory, and answer questions about them."""


@main.command(short_help="Show versions, devices and how the kernels were built.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def env(as_json: bool) -> None:
    """Show versions, devices and how the kernels were built; for bug reports."""
    from livevlm_kernels.env import collect

    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


main.add_command(ask)
main.add_command(bench)
main.add_command(evaluate)

__all__ = ["main"]
