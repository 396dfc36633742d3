"""`hftcore demo`."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the results.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts; a first look.")] = False,
    as_json: AsJson = False,
) -> None:
    """Attack and repair a small real model."""
    from hftcore.bindings.demo.run import run_demo

    # the table is for people, who see it either way
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        report = run_demo(out=out, quick=quick)
    if as_json:
        typer.echo(json.dumps(report))
