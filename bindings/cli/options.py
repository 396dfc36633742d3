"""Options that several commands share, and what their text stands for."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Tokens(StrEnum):
    """Which tokens count."""

    all = "all"
    response = "response"


class Score(StrEnum):
    """How weights are scored."""

    wanda = "wanda"
    magnitude = "magnitude"
    random = "random"


class Scope(StrEnum):
    """What a weight is compared with."""

    row = "row"
    matrix = "matrix"
    model = "model"


class Remove(StrEnum):
    """Which end goes."""

    lowest = "lowest"
    highest = "highest"


class Sparsity(StrEnum):
    """The pattern names of locuslab/wanda."""

    unstructured = "unstructured"
    two_four = "2:4"
    four_eight = "4:8"


class DType(StrEnum):
    """The dtype a model is loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model or PEFT adapter.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")]
OutHere = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write. [default: METHOD-MODEL, or the name of a pipeline's file]"),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Calibration texts: .jsonl with messages, prompt/completion, Alpaca columns or text; or .txt."),
]
EnergyFile = Annotated[
    Path | None, typer.Option("--energy", help="What `hftcore calibrate` wrote, in place of --data.")
]
Base = Annotated[str | None, typer.Option(help="Base model of an adapter, in place of the one it names.")]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Model or adapter before fine-tuning: score the change since, and restore its weights. "
        "Adapters are merged, unless --targets lora compares their factors."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: the first GPU, else cpu]")]
LoadDType = Annotated[DType, typer.Option("--dtype", help="Load the weights in this dtype; auto is that of the files.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Layers: all-linear, lora, names (a,b or repeated; suffixes match), or a regular expression."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Layers to leave out, written as for --targets.")]
CountTokens = Annotated[Tokens, typer.Option("--tokens", help="Count all tokens, or those of the responses only.")]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-calibration-samples", "--nsamples", min=1, help="Use the first so many samples. [default: all]"
    ),
]
MaxLength = Annotated[int, typer.Option("--max-seq-length", min=1, help="Tokens of a sample that are kept.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a forward pass.")]
Seed = Annotated[int, typer.Option(help="Seed of the random score.")]
ScoreBy = Annotated[Score, typer.Option("--score", help="wanda, or a baseline that needs no data.")]
EditOnly = Annotated[bool, typer.Option("--edit-only", help="Write the Edit only, not the model.")]
Offload = Annotated[
    bool | None,
    typer.Option(
        "--offload/--no-offload",
        help="Measure block by block from the model's files, in the memory of two blocks. "
        "[default: if the model does not fit into memory]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def named_after(method: str, model: str) -> Path:
    """Where a result goes if nothing was said.

    >>> str(named_after("edits/one,shrink", "runs/m/"))
    'one-shrink-m'
    """
    return Path("-".join([*(Path(name).name for name in method.split(",")), Path(model).resolve().name]))


def layers(names: list[str] | None) -> str | list[str] | None:
    """PEFT's convention from the command line: a keyword or a regular expression is a string, names are a list."""
    if not names:
        return None
    if len(names) == 1 and (names[0] in ("all-linear", "lora") or not re.fullmatch(r"[\w.,-]+", names[0])):
        return names[0]
    return [name for value in names for name in value.split(",") if name]
