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
from hftcore.bindings.data import load_samples, make_batches
from hftcore.bindings.models_io import load_model, save_model
from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
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


def run_calibrate(job: Job) -> Result:
    """Measure the input energies of a model's layers and save them."""
    _check(job)
    model, tokenizer = _load(job)
    energy = hftcore.calibrate(
        model, _batches(job, tokenizer), targets=job.targets or "all-linear", exclude=job.exclude, tokens=job.tokens
    )
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
    _check(job)
    if sequential and (job.energy or job.score != "wanda"):
        raise HftcoreError("--sequential calibrates as it prunes: it needs --data, --score wanda and no --energy")
    model, tokenizer = _load(job)
    reference = _reference(job)
    options = {"reference": reference, "score": job.score, "seed": job.seed, "exclude": job.exclude}
    if sequential:
        batches = _batches(job, tokenizer)
        options |= {"targets": job.targets, "sequential": True, "tokens": job.tokens}
        with job.timed("prune"):
            edit = hftcore.prune(model, batches, pattern, **options)
        return _save(job, model, tokenizer, edit)
    energy = _energy(job, model, tokenizer)
    with job.timed("prune"):
        edit = hftcore.prune(model, energy, pattern, targets=job.targets, **options)
    return _save(job, model, tokenizer, edit)


def run_antidote(job: Job, dense_ratio: float) -> Result:
    """Remove a fine-tuned model's weights that matter most for harmful data, and save it, or only the Edit."""
    _check(job)
    model, tokenizer = _load(job)
    harmful: Any = None
    if job.energy:
        harmful = Energy.load(job.energy, next(model.parameters()).device)
    elif job.score == "wanda":
        harmful = _batches(job, tokenizer)
    with job.timed("antidote"):
        edit = hftcore.antidote(
            model,
            harmful,
            dense_ratio,
            targets=job.targets,
            exclude=job.exclude,
            tokens=job.tokens,
            score=job.score,
            seed=job.seed,
            reference=_reference(job),
        )
    return _save(job, model, tokenizer, edit)


def run_patch(action: Literal["apply", "revert"], edit_path: Path, model: Path, out: Path) -> Result:
    """Apply or revert an Edit on a checkpoint folder."""
    check_output(out, [edit_path, model], "--out")
    edit = Edit.load(edit_path)
    patch = checkpoint.apply_edit if action == "apply" else checkpoint.revert_edit
    with _writing(out):
        patch(edit, model, out)
    return {"out": str(out), **_counts(edit)}


def _check(job: Job) -> None:
    """Refuse before anything slow happens."""
    sources = [path for path in (job.model, job.reference, job.base) if path]
    check_output(job.out, sources, "--out")
    if job.data is not None and job.energy is not None:
        raise HftcoreError("--data and --energy were both given; give one")
    if job.data is None and job.energy is None and job.score == "wanda":
        raise HftcoreError("--data is needed to measure activations; give a .jsonl or .txt file (or --energy)")


def _load(job: Job) -> tuple[Any, Any]:
    with job.timed("load"):
        return load_model(job.model, job.device, job.dtype, job.base)


def _reference(job: Job) -> Any:
    if job.reference is None:
        return None
    with job.timed("load reference"):
        return load_model(job.reference, job.device, job.dtype)[0]


def _batches(job: Job, tokenizer: Any) -> Track[dict[str, torch.Tensor]]:
    samples = load_samples(str(job.data))
    response = job.tokens == "response"
    batches = make_batches(samples, tokenizer, job.batch_size, job.max_length, job.num_samples, response)
    return Track(batches, "calibrate")


def _energy(job: Job, model: Any, tokenizer: Any) -> Energy | None:
    """From the file, from the data, or None where the score does not ask."""
    if job.energy is not None:
        return Energy.load(job.energy, next(model.parameters()).device)
    if job.score != "wanda":
        return None
    with job.timed("calibrate"):
        return hftcore.calibrate(
            model, _batches(job, tokenizer), targets=job.targets or "all-linear", exclude=job.exclude, tokens=job.tokens
        )


def _save(job: Job, model: Any, tokenizer: Any, edit: Edit) -> Result:
    with job.timed("save"), _writing(job.out):
        if job.edit_only:
            edit.save(job.out)
        else:
            save_model(model, tokenizer, job.out, (job.model,), edit)
    return {"out": str(job.out), "edit_only": job.edit_only, **_counts(edit), "seconds": job.seconds}


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
