"""What the commands do, between the command line (`cli/`) and the library."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

import hftcore
from hftcore.bindings.checkpoints.edits import apply_edit, revert_edit
from hftcore.bindings.checkpoints.job import calibrate_offloaded, offloads, prune_offloaded, prune_streamed, streams
from hftcore.bindings.jobs import Job, Loaded, batches_of, open_plain, open_to_prune
from hftcore.bindings.models_io import save_model
from hftcore.bindings.output import check_output
from hftcore.defenses.antidote import FULL_WEIGHTS
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets
from hftcore.pattern import Pattern

Result = dict[str, Any]


def run_calibrate(job: Job) -> Result:
    """Measure the input energies of a model's layers and save them."""
    targets = job.targets or "all-linear"
    offloaded = offloads(job, prunes=False)
    energy = calibrate_offloaded(job, targets) if offloaded else _calibrate(job, open_plain(job), targets)
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
    if offloads(job, prunes=True, sequential=sequential):
        return _on_files(job, lambda: prune_offloaded(job, pattern, targets, {}))
    if not sequential and streams(job):
        return _on_files(job, lambda: prune_streamed(job, pattern, {}))
    loaded = open_to_prune(job, targets)
    model, energy = loaded.model, loaded.energy
    options = {"reference": loaded.reference, "score": job.score, "seed": job.seed, "exclude": job.exclude}
    if sequential:
        with job.timed("prune"):
            batches = batches_of(job, loaded)
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
    offloaded = offloads(job, prunes=True)
    if offloaded or streams(job):
        if job.reference is None:
            warnings.warn(FULL_WEIGHTS, stacklevel=2)
        recipe, pattern = {"method": "antidote", "dense_ratio": dense_ratio}, Pattern(dense_ratio, remove="highest")
        if offloaded:
            return _on_files(job, lambda: prune_offloaded(job, pattern, job.targets or "all-linear", recipe))
        return _on_files(job, lambda: prune_streamed(job, pattern, recipe))
    loaded = open_to_prune(job, job.targets)
    harmful: Any = loaded.energy
    if harmful is None and job.score == "wanda":
        harmful = batches_of(job, loaded)
    return antidote_loaded(job, loaded, harmful, dense_ratio)


def antidote_loaded(job: Job, loaded: Loaded, harmful: Any, dense_ratio: float) -> Result:
    """Carry out `antidote` on a model in memory; `harmful` is what `hftcore.antidote` takes."""
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
    patch = apply_edit if action == "apply" else revert_edit
    with _writing(out):
        patch(edit, model, out)
    return {"out": str(out), **_counts(edit)}


def _calibrate(job: Job, loaded: Loaded, targets: Targets) -> Energy:
    with job.timed("calibrate"):
        return hftcore.calibrate(
            loaded.model,
            batches_of(job, loaded),
            targets=targets,
            exclude=job.exclude,
            tokens=job.tokens,
        )


def _on_files(job: Job, prune: Callable[[], Edit]) -> Result:
    with job.timed("prune"), _writing(job.out):
        edit = prune()
    return {"out": str(job.out), "edit_only": job.edit_only, "merged": False, **_counts(edit), "seconds": job.seconds}


def _save(job: Job, loaded: Loaded, edit: Edit) -> Result:
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
        raise HftcoreError(f"cannot write --out {out}: {error}; there is nothing at {out}") from error


def _counts(edit: Edit) -> Result:
    counts = {"tensors": len(edit.tensors), "removed": edit.removed, "size": edit.size, "sparsity": edit.sparsity}
    return {**counts, "recipe": edit.recipe}
