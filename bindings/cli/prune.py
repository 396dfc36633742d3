"""`hftcore calibrate`, `hftcore wanda` and `hftcore antidote`: measure a model and prune it."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hftcore.bindings.cli.adapters import Adapters, More, OnRay, Resume, Workers, repair_adapters
from hftcore.bindings.cli.options import (
    AsJson,
    Base,
    BatchSize,
    CountTokens,
    Data,
    Device,
    DType,
    EditOnly,
    EnergyFile,
    Exclude,
    LoadDType,
    MaxLength,
    Model,
    NumSamples,
    Offload,
    Out,
    Reference,
    Remove,
    Scope,
    Score,
    ScoreBy,
    Seed,
    Sparsity,
    Targets,
    Tokens,
    layers,
)
from hftcore.bindings.cli.reporting import emit


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
    offload: Offload = None,
    as_json: AsJson = False,
) -> None:
    """Measure the input energies of a model's layers."""
    from hftcore.bindings.commands import run_calibrate
    from hftcore.bindings.jobs import Job

    job = Job(
        model,
        out,
        data,
        base=base,
        device=device,
        dtype=dtype.value,
        targets=layers(targets),
        exclude=layers(exclude),
        tokens=tokens.value,
        num_samples=num_calibration_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
        offload=offload,
    )
    result = run_calibrate(job)
    counted = f"{result['layers']} layers, {result['tokens']:,} tokens of {result['samples']:,} samples"
    emit(result, as_json, f"Measured {counted}; wrote {out}")


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
    offload: Offload = None,
    edit_only: EditOnly = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model by Wanda's score, weight times input norm."""
    from hftcore.bindings.commands import run_wanda
    from hftcore.bindings.jobs import Job

    pattern = _pattern(sparsity, sparsity_type, scope, remove, block)
    job = Job(
        model,
        out,
        data,
        energy=energy,
        base=base,
        reference=reference,
        device=device,
        dtype=dtype.value,
        targets=layers(targets),
        exclude=layers(exclude),
        tokens=tokens.value,
        num_samples=num_calibration_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
        score=score.value,
        seed=seed,
        edit_only=edit_only,
        offload=offload,
    )
    result = run_wanda(job, pattern, sequential)
    emit(result, as_json, _pruned(result))


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


def antidote(
    model: Model,
    out: Out,
    more: More = None,
    data: Data = None,
    dense_ratio: Annotated[
        float, typer.Option(help="Share of the weights removed, in [0, 1]: the highest scores of each row.")
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
    offload: Offload = None,
    edit_only: EditOnly = False,
    adapters: Adapters = None,
    workers: Workers = 1,
    on_ray: OnRay = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Remove the weights that matter for harmful data.

    Antidote: of each row of the fine-tuned weights, the highest scores on the harmful texts go."""
    from hftcore.bindings.commands import run_antidote
    from hftcore.bindings.jobs import Job

    if not 0 <= dense_ratio <= 1:
        raise typer.BadParameter(f"--dense-ratio must be a share in [0, 1], got {dense_ratio}")
    if not adapters and (more or workers != 1 or on_ray or resume):
        raise typer.BadParameter("several adapters, --workers, --ray and --resume go with --adapters")
    job = Job(
        model,
        out,
        data,
        energy=energy,
        base=base,
        reference=reference,
        device=device,
        dtype=dtype.value,
        targets=layers(targets),
        exclude=layers(exclude),
        tokens=tokens.value,
        num_samples=num_calibration_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
        score=score.value,
        seed=seed,
        edit_only=edit_only,
        offload=offload,
    )
    if adapters:
        if offload:
            raise typer.BadParameter("--offload measures one model, --adapters one for each adapter: choose one")
        repair_adapters(job, dense_ratio, [*adapters, *(more or [])], workers, on_ray, resume, as_json)
        return
    result = run_antidote(job, dense_ratio)
    emit(result, as_json, _pruned(result))


def _pruned(result: dict[str, Any]) -> str:
    what = "the Edit" if result["edit_only"] else "the model, with its Edit in edit/,"
    share = f"{result['removed']:,} of {result['size']:,} weights ({result['sparsity']:.2%})"
    done = "Merged the adapter first, as --reference compares whole weights; removed" if result["merged"] else "Removed"
    return f"{done} {share} in {result['tensors']} tensors; wrote {what} to {result['out']}"
