"""`hftcore train`."""

from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson, Device, DType, LoadDType, Model, Out
from hftcore.bindings.cli.reporting import emit
from hftcore.bindings.trainers import METHODS


def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help=f"One of {', '.join(METHODS)}.")],
    model: Model,
    config: Annotated[Path, typer.Option(help="YAML: train_data and the method's other data, lora, settings.")],
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    as_json: AsJson = False,
) -> None:
    """Train a model or adapter with a defence."""
    from hftcore.bindings.training import run_training

    result = run_training(method, model, config, out, resume, device, dtype.value)
    done = f"Trained {result['steps']:,} steps of {method}, mean loss {result['loss']:.4g}; wrote {out}"
    emit(result, as_json, done)
