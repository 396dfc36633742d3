"""The command line `hftcore`. Only typer is imported here; a command imports the rest when it runs."""

import functools
import json
import re
import signal
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hftcore",
    help="Defend language models against harmful fine-tuning: calibrate, prune, apply and revert edits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
Data = Annotated[
    Path | None,
    typer.Option(help="Calibration texts: .jsonl with messages, prompt/completion, Alpaca columns or text; or .txt."),
]
EnergyFile = Annotated[
    Path | None, typer.Option("--energy", help="What `hftcore calibrate` wrote, in place of --data.")
]
Base = Annotated[str | None, typer.Option(help="Base model of an adapter, in place of the one it names.")]
Reference = Annotated[
    str | None, typer.Option(help="Model before fine-tuning: score the change since, and restore its weights.")
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
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one line on stderr and an exit code: 1 for failure, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("interrupted; no output was left behind", err=True)
                raise typer.Exit(130) from None
            except Exception as error:
                # typer's own errors know how to show themselves
                if isinstance(error, typer.Exit) or hasattr(error, "format_message"):
                    raise
                message = " ".join(str(error).split())
                known = isinstance(error, (ValueError, OSError)) and message
                typer.echo(f"error: {message if known else f'{type(error).__name__}: {message}'}", err=True)
                raise typer.Exit(1) from error

    return run


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result) if as_json else text)


def _layers(names: list[str] | None) -> str | list[str] | None:
    """PEFT's convention from the command line: a keyword or a regular expression is a string, names are a list."""
    if not names:
        return None
    if len(names) == 1 and (names[0] in ("all-linear", "lora") or not re.fullmatch(r"[\w.,-]+", names[0])):
        return names[0]
    return [name for value in names for name in value.split(",") if name]


def _pruned(result: dict[str, Any]) -> str:
    what = "the Edit" if result["edit_only"] else "the model, with its Edit in edit/,"
    share = f"{result['removed']:,} of {result['size']:,} weights ({result['sparsity']:.2%})"
    return f"Removed {share} in {result['tensors']} tensors; wrote {what} to {result['out']}"


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the results.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts; a first look.")] = False,
) -> None:
    """Attack and repair a small real model."""
    from hftcore.bindings.demo import run_demo

    run_demo(out=out, quick=quick)


@app.command()
@reported
def calibrate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Texts, as for the other commands.")],
    out: Annotated[Path, typer.Option(help="File to write, energy.safetensors for example.")],
    targets: Targets = None,
    exclude: Exclude = None,
    tokens: CountTokens = Tokens.all,
    num_calibration_samples: NumSamples = None,
    max_seq_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    as_json: AsJson = False,
) -> None:
    """Measure the input energies of a model's layers."""
    from hftcore.bindings.commands import Job, run_calibrate

    job = Job(
        model,
        out,
        data,
        base=base,
        device=device,
        dtype=dtype.value,
        targets=_layers(targets),
        exclude=_layers(exclude),
        tokens=tokens.value,
        num_samples=num_calibration_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
    )
    result = run_calibrate(job)
    counted = f"{result['layers']} layers, {result['tokens']:,} tokens of {result['samples']:,} samples"
    _emit(result, as_json, f"Measured {counted}; wrote {out}")


@app.command()
@reported
def wanda(
    model: Model,
    out: Out,
    data: Data = None,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", "--sparsity-ratio", help="Share removed, 50% or 0.5; or n:m, 2:4. [default: 50%]"),
    ] = None,
    sparsity_type: Annotated[
        Sparsity | None, typer.Option(help="As in locuslab/wanda; 2:4 and 4:8 stand for --sparsity 2:4 and 4:8.")
    ] = None,
    scope: Annotated[
        Scope, typer.Option(help="Compare weights in their row, their matrix or the whole model.")
    ] = Scope.row,
    remove: Annotated[Remove, typer.Option(help="Remove the lowest or the highest scores.")] = Remove.lowest,
    block: Annotated[str | None, typer.Option(help="Remove whole blocks, ROWSxCOLUMNS, 16x16 for example.")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate each block after those before it are pruned.")
    ] = False,
    energy: EnergyFile = None,
    reference: Reference = None,
    targets: Targets = None,
    exclude: Exclude = None,
    tokens: CountTokens = Tokens.all,
    num_calibration_samples: NumSamples = None,
    max_seq_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    score: ScoreBy = Score.wanda,
    seed: Seed = 0,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    edit_only: EditOnly = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model by Wanda's score, weight times input norm."""
    from hftcore.bindings.commands import Job, run_wanda

    pattern = _pattern(sparsity, sparsity_type, scope, remove, block)
    job = Job(
        model,
        out,
        data,
        energy,
        base,
        reference,
        device,
        dtype.value,
        _layers(targets),
        _layers(exclude),
        tokens.value,
        num_calibration_samples,
        max_seq_length,
        batch_size,
        score.value,
        seed,
        edit_only,
    )
    result = run_wanda(job, pattern, sequential)
    _emit(result, as_json, _pruned(result))


def _pattern(sparsity: str | None, kind: Sparsity | None, scope: Scope, remove: Remove, block: str | None) -> Any:
    """The Pattern the flags ask for; what they get wrong is a usage error."""
    from hftcore import HftcoreError, Pattern

    amount = sparsity or "50%"
    if kind not in (None, Sparsity.unstructured):
        # locuslab's command lines give 0.5 beside 2:4
        if sparsity not in (None, "0.5", "50%", kind.value):
            raise typer.BadParameter(
                f"--sparsity-type {kind.value} removes half, got --sparsity {sparsity}; leave one out"
            )
        amount = kind.value
    sizes = None
    if block is not None:
        if not re.fullmatch(r"\d+x\d+", block):
            raise typer.BadParameter(f"--block must be ROWSxCOLUMNS such as 16x16, got {block!r}")
        rows, columns = map(int, block.split("x"))
        sizes = rows, columns
    try:
        return Pattern(amount, scope=scope.value, remove=remove.value, block=sizes)
    except HftcoreError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
@reported
def antidote(
    model: Model,
    out: Out,
    data: Data = None,
    dense_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the weights removed: the highest scores of each row.")
    ] = 0.1,
    energy: EnergyFile = None,
    reference: Reference = None,
    targets: Targets = None,
    exclude: Exclude = None,
    tokens: CountTokens = Tokens.all,
    num_calibration_samples: NumSamples = None,
    max_seq_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    score: ScoreBy = Score.wanda,
    seed: Seed = 0,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    edit_only: EditOnly = False,
    as_json: AsJson = False,
) -> None:
    """Remove the weights that matter for harmful data.

    Antidote: of each row of the fine-tuned weights, the highest scores on the harmful texts go."""
    from hftcore.bindings.commands import Job, run_antidote

    job = Job(
        model,
        out,
        data,
        energy,
        base,
        reference,
        device,
        dtype.value,
        _layers(targets),
        _layers(exclude),
        tokens.value,
        num_calibration_samples,
        max_seq_length,
        batch_size,
        score.value,
        seed,
        edit_only,
    )
    result = run_antidote(job, dense_ratio)
    _emit(result, as_json, _pruned(result))


EditFolder = Annotated[Path, typer.Argument(metavar="EDIT", help="Folder of an Edit.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder of a model or adapter.")]


@app.command()
@reported
def apply(edit: EditFolder, model: ModelFolder, out: Out, as_json: AsJson = False) -> None:
    """Apply an Edit to a checkpoint folder.

    Writes a changed copy to OUT, without loading the model."""
    _patch("apply", edit, model, out, as_json)


@app.command()
@reported
def revert(edit: EditFolder, model: ModelFolder, out: Out, as_json: AsJson = False) -> None:
    """Undo an Edit on a checkpoint folder.

    Writes the original, byte for byte, to OUT, without loading the model."""
    _patch("revert", edit, model, out, as_json)


def _patch(action: Any, edit: Path, model: Path, out: Path, as_json: bool) -> None:
    from hftcore.bindings.commands import run_patch

    result = run_patch(action, edit, model, out)
    done = "Applied the Edit" if action == "apply" else "Reverted the Edit"
    _emit(result, as_json, f"{done} ({result['removed']:,} weights in {result['tensors']} tensors); wrote {out}")


@app.command()
@reported
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can run and what is missing."""
    from hftcore.bindings.doctor import examine, render

    report = examine()
    _emit(report, as_json, render(report))


def main() -> None:
    """Run the command line; usage errors are one line on stderr and exit code 2."""
    # so that a polite kill cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        # help, which is what no arguments at all ask for, keeps its lines
        typer.echo(message if message.startswith("Usage:") else f"error: {message} (see hftcore --help)", err=True)
        sys.exit(getattr(error, "exit_code", 2))
