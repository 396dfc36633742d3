"""`hftcore gradnorms`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson, Base, BatchSize, Device, DType, LoadDType, MaxLength, Model
from hftcore.bindings.cli.reporting import emit


class Over(StrEnum):
    """Whose gradients are measured."""

    auto = "auto"
    lora = "lora"
    all = "all"


class Loss(StrEnum):
    """Of which loss of a sample the gradient is."""

    mean = "mean"
    sum = "sum"


def gradnorms(
    model: Model,
    data: Annotated[Path, typer.Option(help="Texts: .jsonl with messages, prompt/completion or Alpaca columns; .txt.")],
    out: Annotated[Path, typer.Option(help="File to write, norms.jsonl: one JSON object a sample.")],
    against: Annotated[Path | None, typer.Option(help="A second file to compare with, harmful texts say.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the histograms, norms.png.")] = None,
    over: Annotated[
        Over, typer.Option(help="Parameters: all, or the LoRA factors; auto takes the factors of an adapter.")
    ] = Over.auto,
    loss: Annotated[
        Loss, typer.Option(help="A sample's loss: the mean or the sum over its response tokens.")
    ] = Loss.mean,
    layers: Annotated[bool, typer.Option("--layers", help="Write each sample's norm by decoder block too.")] = False,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", min=1, help="Use the first so many samples of each file.")
    ] = None,
    max_seq_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    as_json: AsJson = False,
) -> None:
    """Measure how hard each sample would pull at a model.

    The norm of each sample's own gradient, to a file and as histograms: benign beside harmful data, for example."""
    from hftcore.bindings.gradnorms import run_gradnorms
    from hftcore.bindings.jobs import Job

    job = Job(
        model,
        out,
        data,
        base=base,
        device=device,
        dtype=dtype.value,
        num_samples=num_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
    )
    result = run_gradnorms(job, against, plot, over.value, loss.value, layers)
    lines = [
        f"{name}: {one['samples']} samples, median norm {one['median']:.4g} (quartiles {one['lower']:.4g} to {one['upper']:.4g})"
        for name, one in result["norms"].items()
    ]
    if "separation" in result:
        lines.append(
            f"a random sample of {list(result['norms'])[1]} has the larger norm with probability {result['separation']:.2f}"
        )
    written = " and ".join(path for path in (result["out"], result["plot"]) if path)
    emit(result, as_json, "\n".join([*lines, f"wrote {written}"]))
