"""What the commands do, between the command line (`cli/`) and the library."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

import hftcore
from hftcore.bindings import checkpoint
from hftcore.bindings.data import Sample, load_samples, make_batches
from hftcore.bindings.models_io import find_base, is_adapter, load_model, merged, refuse_base_weights, save_model
from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.defenses.antidote import default_targets
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets, find_layers
from hftcore.matching import energy_layers, reference_weights
from hftcore.pattern import Pattern

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The choices shared by the commands that load a model; each is the command-line option of its name."""

    model: str
    out: Path
    data: Path | None = None
    energy: Path | None = None
    base: str | None = None
    reference: str | None = None
    device: str | None = None
    dtype: str = "auto"
    targets: str | list[str] | None = None
    exclude: str | list[str] | None = None
    tokens: Literal["all", "response"] = "all"
    num_samples: int | None = None
    max_length: int = 512
    batch_size: int = 8
    score: Literal["wanda", "magnitude", "random"] = "wanda"
    seed: int = 0
    edit_only: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class _Loaded:
    """What a job works on. `energy` is that of the file; `reference` and `energy` are None where none was given."""

    model: Any
    tokenizer: Any
    samples: list[Sample]
    energy: Energy | None = None
    reference: Any = None
    merged: bool = False


def run_calibrate(job: Job) -> Result:
    """Measure the input energies of a model's layers and save them."""
    check_output(job.out, _sources(job), "--out", is_file=True)
    samples = load_samples(str(job.data))
    with job.timed("load"):
        loaded = _Loaded(*load_model(job.model, job.device, job.dtype, job.base), samples)
    energy = _calibrate(job, loaded, "all-linear")
    with _writing(job.out):
        energy.save(job.out)
    return {
        "out": str(job.out),
        "layers": len(energy),
        "tokens": energy.tokens,
        "samples": energy.samples,
        "seconds": job.seconds,
    }


def run_wanda(job: Job, pattern: Pattern, sequential: bool) -> Result:
    """Prune a model by Wanda's score and save it, or only the Edit."""
    if sequential and (job.energy or job.score != "wanda"):
        raise HftcoreError("--sequential calibrates as it prunes: it needs --data, --score wanda and no --energy")
    targets = job.targets or "all-linear"
    loaded = _open(job, targets)
    model, energy = loaded.model, loaded.energy
    options = {"reference": loaded.reference, "score": job.score, "seed": job.seed, "exclude": job.exclude}
    if sequential:
        with job.timed("prune"):
            batches = _batches(job, loaded)
            edit = hftcore.prune(
                model, batches, pattern, targets=targets, sequential=True, tokens=job.tokens, **options
            )
        return _save(job, loaded, edit)
    if energy is None and job.score == "wanda":
        energy = _calibrate(job, loaded, targets)
    with job.timed("prune"):
        edit = hftcore.prune(model, energy, pattern, targets=job.targets, **options)
    return _save(job, loaded, edit)


def run_antidote(job: Job, dense_ratio: float) -> Result:
    """Remove a fine-tuned model's weights that matter most for harmful data, and save it, or only the Edit."""
    loaded = _open(job, job.targets)
    harmful: Any = loaded.energy
    if harmful is None and job.score == "wanda":
        harmful = _batches(job, loaded)
    with job.timed("antidote"):
        edit = hftcore.antidote(
            loaded.model,
            harmful,
            dense_ratio,
            targets=job.targets,
            exclude=job.exclude,
            tokens=job.tokens,
            score=job.score,
            seed=job.seed,
            reference=loaded.reference,
        )
    return _save(job, loaded, edit)


def run_patch(action: Literal["apply", "revert"], edit_path: Path, model: Path, out: Path) -> Result:
    """Apply or revert an Edit on a checkpoint folder."""
    check_output(out, [edit_path, model], "--out")
    edit = Edit.load(edit_path)
    patch = checkpoint.apply_edit if action == "apply" else checkpoint.revert_edit
    with _writing(out):
        patch(edit, model, out)
    return {"out": str(out), **_counts(edit)}


def _open(job: Job, targets: Targets | None) -> _Loaded:
    """Read the data and load the models of a job that prunes; what cannot end well is refused before anything is measured.

    `targets` None stands for what `hftcore.antidote` chooses. With a reference, adapters are merged into their base models,
    unless it is their factors that are compared (targets "lora")."""
    _check(job)
    is_tuned, is_reference = is_adapter(job.model), job.reference is not None and is_adapter(job.reference)
    merges = job.reference is not None and targets != "lora" and (is_tuned or is_reference)
    if is_tuned:
        _check_adapter(job, targets, merges, is_reference)
    samples = load_samples(str(job.data)) if job.data is not None else []
    energy = None if job.energy is None else Energy.load(job.energy)
    with job.timed("load"):
        base = None if is_reference and not is_tuned else job.base
        model, tokenizer = load_model(job.model, job.device, job.dtype, base)
    reference = None
    if job.reference is not None:
        with job.timed("load reference"):
            base = job.base if is_reference else None
            reference, _ = load_model(job.reference, job.device, job.dtype, base)
    if merges:
        model, reference = merged(model), merged(reference)
    if energy is not None:
        layers = energy_layers(model, energy, job.targets, job.exclude)
    else:
        layers = find_layers(model, default_targets(model) if targets is None else targets, job.exclude)
    if is_tuned and not merges and not job.edit_only:
        refuse_base_weights([layer.tensor for layer in layers])
    if reference is not None:
        reference_weights(reference, layers)
    return _Loaded(model, tokenizer, samples, energy, reference, merges)


def _check(job: Job) -> None:
    """Refuse what the options alone tell."""
    check_output(job.out, _sources(job), "--out")
    measured = [name for name, path in (("--data", job.data), ("--energy", job.energy)) if path is not None]
    if job.score == "wanda" and not measured:
        raise HftcoreError("--data is needed to measure activations; give a .jsonl or .txt file (or --energy)")
    if job.score != "wanda" and measured:
        raise HftcoreError(f"--score {job.score} looks at no activations: leave {measured[0]} out")
    if len(measured) > 1:
        raise HftcoreError("--data and --energy were both given; give one")


def _check_adapter(job: Job, targets: Targets | None, merges: bool, is_reference: bool) -> None:
    """Refuse what cannot be done to an adapter."""
    if targets == "all-linear" and not merges and not job.edit_only:
        refuse_base_weights(["all linear layers"])
    if merges and job.edit_only:
        raise HftcoreError(
            f"--reference merges the adapter {job.model}, and an Edit alone would fit no file: leave --edit-only out"
        )
    if targets == "lora" and job.reference is not None and not is_reference:
        raise HftcoreError(
            f"--targets lora compares factors: --reference must be an adapter too, got {job.reference}; "
            "leave --targets out to compare merged weights"
        )
    if is_reference and job.base is None:
        ours, theirs = find_base(job.model), find_base(str(job.reference))
        if ours.resolve() != theirs.resolve():
            raise HftcoreError(
                f"MODEL is an adapter of {ours} and --reference one of {theirs}; they must be of the same base model (--base)"
            )


def _sources(job: Job) -> list[str]:
    return [path for path in (job.model, job.reference, job.base) if path]


def _batches(job: Job, loaded: _Loaded) -> Track[dict[str, torch.Tensor]]:
    response = job.tokens == "response"
    batches = make_batches(loaded.samples, loaded.tokenizer, job.batch_size, job.max_length, job.num_samples, response)
    return Track(batches, "calibrate")


def _calibrate(job: Job, loaded: _Loaded, targets: Targets) -> Energy:
    with job.timed("calibrate"):
        return hftcore.calibrate(
            loaded.model, _batches(job, loaded), targets=job.targets or targets, exclude=job.exclude, tokens=job.tokens
        )


def _save(job: Job, loaded: _Loaded, edit: Edit) -> Result:
    with job.timed("save"), _writing(job.out):
        if job.edit_only:
            edit.save(job.out)
        else:
            save_model(loaded.model, loaded.tokenizer, job.out, (job.model,), edit)
    return {
        "out": str(job.out),
        "edit_only": job.edit_only,
        "merged": loaded.merged,
        **_counts(edit),
        "seconds": job.seconds,
    }


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say of a failed write what failed; what was half-written is gone by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HftcoreError(f"cannot write --out {out}: {error}; nothing was left there") from error


def _counts(edit: Edit) -> Result:
    counts = {"tensors": len(edit.tensors), "removed": edit.removed, "size": edit.size, "sparsity": edit.sparsity}
    return {**counts, "recipe": edit.recipe}
