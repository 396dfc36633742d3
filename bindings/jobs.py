"""A command's choices, and from them the models and data it works on. What cannot end well is refused before work is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hftcore.bindings.data import Sample, load_samples, make_batches
from hftcore.bindings.models_io import (
    find_base,
    find_folder,
    is_adapter,
    load_model,
    load_tokenizer,
    merged,
    refuse_base_weights,
)
from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.defenses.antidote import default_targets
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets, find_layers
from hftcore.matching import energy_layers, reference_weights


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
    offload: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Loaded:
    """What a job works on. `energy` is that of the file; `reference` and `energy` are None where none was given."""

    model: Any
    tokenizer: Any
    samples: list[Sample]
    energy: Energy | None = None
    reference: Any = None
    merged: bool = False


def open_plain(job: Job) -> Loaded:
    """The model as it is and the data, to measure; `out` is to be a file."""
    check_output(job.out, _sources(job), "--out", is_file=True)
    samples = load_samples(str(job.data))
    with job.timed("load"):
        return Loaded(*load_model(job.model, job.device, job.dtype, job.base), samples)


def open_data(job: Job, is_file: bool) -> Loaded:
    """The data alone, with the tokenizer, for a model that is not loaded as a whole; `is_file` as for `check_output`."""
    check_output(job.out, _sources(job), "--out", is_file=is_file)
    samples = load_samples(str(job.data))
    return Loaded(None, load_tokenizer([find_folder(job.model)]), samples)


def open_to_prune(job: Job, targets: Targets | None) -> Loaded:
    """Read the data and load the models of a job that prunes; what cannot end well is refused before anything is measured.

    `targets` None stands for what `hftcore.antidote` chooses. With a reference, adapters are merged into their base models,
    unless it is their factors that are compared (targets "lora")."""
    _check(job)
    is_tuned = is_adapter(job.model)
    is_reference = job.reference is not None and is_adapter(job.reference, "--reference")
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
    return Loaded(model, tokenizer, samples, energy, reference, merges)


def batches_of(job: Job, loaded: Loaded) -> Track[dict[str, torch.Tensor]]:
    """The job's samples as the model takes them, with a progress bar."""
    response = job.tokens == "response"
    batches = make_batches(loaded.samples, loaded.tokenizer, job.batch_size, job.max_length, job.num_samples, response)
    return Track(batches, "calibrate")


def _check(job: Job) -> None:
    """Refuse what the options alone tell."""
    check_output(job.out, _sources(job), "--out")
    check_measured(job)


def check_measured(job: Job) -> None:
    """Refuse activations where the score needs none, and none where it does."""
    measured = [name for name, path in (("--data", job.data), ("--energy", job.energy)) if path is not None]
    if job.score == "wanda" and not measured:
        raise HftcoreError("--data is needed to measure activations; give a .jsonl or .txt file (or --energy)")
    if job.score != "wanda" and measured:
        raise HftcoreError(f"--score {job.score} looks at no activations: leave {measured[0]} out")
    if len(measured) > 1:
        raise HftcoreError("--data and --energy were both given; give one")
    if job.energy is not None and not job.energy.exists():
        raise HftcoreError(
            f"--energy must be a file that `hftcore calibrate` wrote, got {job.energy}, which does not exist"
        )


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
    """What is read, and must not be written into."""
    return [path for path in (job.model, job.reference, job.base) if path]
