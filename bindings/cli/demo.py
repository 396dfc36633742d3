"""`hftcore demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the results.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts; a first look.")] = False,
) -> None:
    """Attack and repair a small real model."""
    from hftcore.bindings.demo.run import run_demo

    run_demo(out=out, quick=quick)
