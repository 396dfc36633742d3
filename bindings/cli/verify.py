"""`hftcore verify`."""

from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson
from hftcore.bindings.cli.reporting import emit


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that wanda, antidote, apply or revert wrote.")],
    as_json: AsJson = False,
) -> None:
    """Check that a written folder is whole and unchanged.

    Reads every byte, compares it with the folder's manifest, and undoes its Edit in memory. Exit code 1 if anything differs."""
    from hftcore.bindings.checkpoints.verify import verify_folder

    report = verify_folder(folder)
    problems = report["problems"]
    counted = f"{report['tensors']:,} tensors in {report['files']} files, {report['bytes']:,} bytes"
    said = (
        "\n".join([f"{folder} is not as it was written:", *problems]) if problems else f"{folder} is whole: {counted}"
    )
    emit(report, as_json, said)
    if problems:
        raise typer.Exit(1)
