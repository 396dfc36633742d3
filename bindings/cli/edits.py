"""`hftcore apply` and `hftcore revert`: Edits on checkpoint folders."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hftcore.bindings.cli.options import AsJson, Out
from hftcore.bindings.cli.reporting import emit

EditFolder = Annotated[Path, typer.Argument(metavar="EDIT", help="Folder of an Edit.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder of a model or adapter.")]


def apply(edit: EditFolder, model: ModelFolder, out: Out, as_json: AsJson = False) -> None:
    """Apply an Edit to a checkpoint folder.

    Writes a changed copy to OUT, without loading the model."""
    _patch("apply", edit, model, out, as_json)


def revert(edit: EditFolder, model: ModelFolder, out: Out, as_json: AsJson = False) -> None:
    """Undo an Edit on a checkpoint folder.

    Writes the original, byte for byte, to OUT, without loading the model."""
    _patch("revert", edit, model, out, as_json)


def _patch(action: Any, edit: Path, model: Path, out: Path, as_json: bool) -> None:
    from hftcore.bindings.commands import run_patch

    result = run_patch(action, edit, model, out)
    done = "Applied the Edit" if action == "apply" else "Reverted the Edit"
    emit(result, as_json, f"{done} ({result['removed']:,} weights in {result['tensors']} tensors); wrote {out}")
