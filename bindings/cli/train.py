"""`hftcore train`."""

from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson, Device, DType, LoadDType, OutHere, named_after
from hftcore.bindings.cli.reporting import emit
from hftcore.bindings.trainers import METHODS


def train(
    config: Annotated[Path, typer.Option(help="YAML: train_data and the method's other data, lora, settings.")],
    method: Annotated[str | None, typer.Argument(metavar="METHOD", help=f"One of {', '.join(METHODS)}.")] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or hub id of a model or PEFT adapter.")
    ] = None,
    out: OutHere = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    as_json: AsJson = False,
) -> None:
    """Train a model or adapter with a defence; without METHOD and MODEL, run the stages of a pipeline that CONFIG lists."""
    if method is None:
        _pipeline(config, out or Path(config.stem), resume, device, dtype.value, as_json)
        return
    if model is None:
        raise typer.BadParameter("METHOD needs a MODEL")
    from hftcore.bindings.training import run_training

    out = out or named_after(method, model)
    result = run_training(method, model, config, out, resume, device, dtype.value)
    done = f"Trained {result['steps']:,} steps of {method}, mean loss {result['loss']:.4g}; wrote {out}"
    emit(result, as_json, done)


def _pipeline(config: Path, out: Path, resume: bool, device: str | None, dtype: str, as_json: bool) -> None:
    from hftcore.bindings.pipeline import run_pipeline

    if resume:
        raise typer.BadParameter("a pipeline goes on by itself; leave --resume out")
    result = run_pipeline(config, out, device, dtype)
    lines = [f"{'there already' if one['was_there'] else 'done'}: {one['out']}" for one in result["stages"]]
    emit(result, as_json, "\n".join([*lines, f"Result: {result['result']}"]))
