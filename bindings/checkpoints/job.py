"""Which commands need no model in memory, or only a block of it at a time, and how they run."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from hftcore.bindings.checkpoints.offload import calibrate_folder
from hftcore.bindings.checkpoints.one_pass import prune_measuring
from hftcore.bindings.checkpoints.pieces import find_pieces
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.bindings.jobs import Job, batches_of, check_measured, open_data
from hftcore.bindings.memory import available_memory
from hftcore.bindings.models_io import find_device, find_folder, is_adapter
from hftcore.bindings.output import check_output
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets, find_layers
from hftcore.pattern import Pattern

log = logging.getLogger("hftcore")


def streams(job: Job) -> bool:
    """Whether a job that prunes runs on the files: nothing is to be measured, and nothing asks for a model in memory.

    So `--data`, `--score random`, `--device`, `--dtype`, `--base` and adapters are for models in memory.
    """
    measured = job.energy is not None if job.score == "wanda" else job.score == "magnitude" and job.energy is None
    asks = job.data is not None or job.device is not None or job.dtype != "auto" or job.base is not None
    adapters = is_adapter(job.model) or (job.reference is not None and is_adapter(job.reference, "--reference"))
    return measured and not asks and not adapters


def prune_streamed(job: Job, pattern: Pattern, recipe: dict[str, Any]) -> Edit:
    """Carry out a job for which `streams` is true; `recipe` as for `prune_folder`."""
    check_output(job.out, [folder for folder in (job.model, job.reference) if folder], "--out")
    check_measured(job)
    energy = None if job.energy is None else Energy.load(job.energy)
    if energy is not None and "method" in recipe:
        recipe = {**recipe, "average": energy.average}
    return prune_folder(
        find_folder(job.model),
        energy,
        pattern,
        job.out,
        reference=None if job.reference is None else find_folder(job.reference, "--reference"),
        score="magnitude" if energy is None else "wanda",
        targets=job.targets,
        exclude=job.exclude,
        edit_only=job.edit_only,
        recipe=recipe,
    )


def offloads(job: Job, prunes: bool, sequential: bool = False) -> bool:
    """Whether a job measures its model block by block from the files: it says so, or the model does not fit into memory.

    Raises:
        HftcoreError: it says so, and it cannot be done.
    """
    if job.offload is False:
        return False
    obstacle = _obstacle(job, prunes, sequential)
    if job.offload:
        if obstacle is not None:
            raise HftcoreError(f"--offload {obstacle}")
        for name, folder in (("MODEL", job.model), ("--reference", job.reference)):
            if folder is not None:
                list_tensors(find_folder(folder, name))
        return True
    return obstacle is None and not _fits(job)


def calibrate_offloaded(job: Job, targets: Targets) -> Energy:
    """Measure the model of a job for which `offloads` is true."""
    loaded = open_data(job, is_file=True)
    with job.timed("calibrate"):
        return calibrate_folder(
            find_folder(job.model),
            batches_of(job, loaded),
            targets,
            job.exclude,
            job.tokens,
            device=job.device,
            dtype=job.dtype,
            scratch=_scratch(job),
        )


def prune_offloaded(job: Job, pattern: Pattern, targets: Targets, recipe: dict[str, Any]) -> Edit:
    """Measure and prune the model of a job for which `offloads` is true; `recipe` as for `prune_folder`."""
    loaded = open_data(job, is_file=False)
    _check_prunable(job, targets)
    if "method" in recipe:
        recipe = {**recipe, "average": "sum", "tokens": job.tokens}
    return prune_measuring(
        find_folder(job.model),
        batches_of(job, loaded),
        pattern,
        job.out,
        reference=None if job.reference is None else find_folder(job.reference, "--reference"),
        targets=targets,
        exclude=job.exclude,
        tokens=job.tokens,
        edit_only=job.edit_only,
        recipe=recipe,
        device=job.device,
        scratch=_scratch(job),
    )


def _scratch(job: Job) -> Path:
    """Where hidden states go that memory has no room for: where the result will lie."""
    return next(parent for parent in job.out.absolute().parents if parent.exists())


def _obstacle(job: Job, prunes: bool, sequential: bool) -> str | None:
    """Why a job cannot be offloaded, and what to do."""
    if job.data is None or job.energy is not None or job.score != "wanda":
        return "is for measuring: it needs --data, --score wanda and no --energy; what measures nothing works on files anyway"
    if sequential:
        return "measures the model as it is, --sequential as it is pruned so far: choose one"
    if prunes and job.dtype != "auto":
        return f"prunes weights as they are in the files: leave --dtype {job.dtype} out"
    if job.base is not None:
        return "measures whole models, --base is for adapters: leave one out"
    for name, folder in (("MODEL", job.model), ("--reference", job.reference)):
        if folder is not None and is_adapter(folder, name):
            return (
                f"reads whole models, and {name} {folder} is an adapter: merge it into its base model first "
                "(merge_and_unload, then save_pretrained), or leave --offload out"
            )
    return None


def _check_prunable(job: Job, targets: Targets) -> None:
    """Refuse before the long part what `prune_folder` would refuse after it."""
    layers = find_layers(load_skeleton(find_folder(job.model)), targets, job.exclude)
    for name, path in (("MODEL", job.model), ("--reference", job.reference)):
        if path is None:
            continue
        stored = list_tensors(find_folder(path, name))
        for layer in layers:
            try:
                find_pieces(layer.tensor, getattr(layer.module, layer.parameter).shape, layer.transposed, stored)
            except HftcoreError as error:
                raise HftcoreError(f"{name} {path}: {error}") from error


def _fits(job: Job) -> bool:
    """Whether the model, and the one it is compared with, can be loaded; says so where not."""
    try:
        needed = sum(_bytes(find_folder(path), job.dtype) for path in (job.model, job.reference) if path is not None)
    except HftcoreError:
        return True  # loading says what is wrong, or reads formats that cannot be offloaded
    free = available_memory(find_device(job.device))
    # a tenth for what goes through the model
    if needed <= 0.9 * free:
        return True
    log.warning(
        "the weights take %.1f GB and %.1f GB of memory are free: measuring block by block from the files (--offload)",
        needed / 1e9,
        free / 1e9,
    )
    return False


def _bytes(folder: Path, dtype: str) -> int:
    """What the weights of a checkpoint take in memory."""
    bits = None if dtype == "auto" else getattr(torch, dtype).itemsize * 8
    return sum(
        (place.stop - place.start) if bits is None else math.prod(place.shape) * bits // 8
        for place in list_tensors(folder).values()
    )
