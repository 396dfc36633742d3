"""The job list: what is finished, what is to be done, and the report on all of it."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hftcore.bindings.adapters.crews import alone, processes
from hftcore.bindings.adapters.folders import REPORT, check_results, find_adapters, reserved
from hftcore.bindings.adapters.recipes import Line, digest_of, failed, is_finished, line_of, shared_recipe
from hftcore.bindings.adapters.workshop import Task, Work
from hftcore.bindings.data import load_samples
from hftcore.bindings.jobs import Job, check_measured
from hftcore.bindings.models_io import find_folder, is_adapter
from hftcore.bindings.progress import Track
from hftcore.errors import HftcoreError
from hftcore.files import whole_file


def run_adapters(
    job: Job, dense_ratio: float, adapters: Sequence[str], workers: int = 1, on_ray: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Repair many adapters of one base model by Antidote, each as `hftcore antidote ADAPTER --base BASE` does, bit for bit.

    Each gets `job.out/NAME`, whole or absent, and a line in `job.out/report.jsonl`; one that fails does not stop the others.

    Args:
        job: `model` is the base model, `out` the folder of all results. Energies and references are an adapter's own: not here.
        dense_ratio: share removed, see `hftcore.antidote`.
        adapters: as for `find_adapters`.
        workers: processes, each with the base model in its memory and its share of the threads; 1: this process.
        on_ray: the workers are actors of the Ray cluster that RAY_ADDRESS names (else of a local one); all paths must be there on
            every node. With a device "cuda" each has a GPU of its own.
        resume: continue in `job.out`: what is there by the same recipe (choices, base model, data and adapter, by their bytes) is
            kept, and the rest is made.

    Returns:
        {"out", "adapters", "repaired", "kept", "warned" and "failed" (names), "seconds"}.

    Raises:
        HftcoreError: what concerns all of them: a wrong choice, `job.out` is taken or being written, the base model or the data
            cannot be read.
    """
    started = time.perf_counter()
    _check(job)
    folders = find_adapters(adapters)
    base = find_folder(job.model)
    job = replace(
        job,
        # workers may have another working directory
        model=os.path.abspath(job.model) if os.path.isdir(job.model) else job.model,
        data=None if job.data is None else job.data.absolute(),
        out=check_results(job.out, [base, *folders.values()], resume),
    )
    shared = shared_recipe(job, dense_ratio, base)
    with reserved(job.out):
        lines, tasks = _sorted_out(job, shared, folders)
        kept = sum(line["status"] == "repaired" for line in lines)
        with whole_file(job.out / REPORT) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with (job.out / REPORT).open("a", encoding="utf-8") as report:
            for line in Track(_spread(Work(job, dense_ratio), tasks, workers, on_ray), "antidote", len(tasks)):
                lines.append(line)
                print(json.dumps(line), file=report, flush=True)
    bad = [line["name"] for line in lines if line["status"] == "failed"]
    return {
        "out": str(job.out),
        "adapters": len(lines),
        "repaired": len(lines) - kept - len(bad),
        "kept": kept,
        "warned": [line["name"] for line in lines if "warnings" in line],
        "failed": bad,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _check(job: Job) -> None:
    """Refuse what is wrong for all adapters."""
    if job.energy is not None or job.reference is not None:
        name = "--energy" if job.energy is not None else "--reference"
        raise HftcoreError(f"{name} is an adapter's own: leave it out, or repair the adapters one by one")
    if job.base is not None:
        raise HftcoreError("with --adapters, MODEL is the base model: leave --base out")
    if job.targets == "all-linear":
        raise HftcoreError("--adapters share their base model, which is not changed: --targets must be of LoRA factors")
    check_measured(job)
    if is_adapter(job.model):
        raise HftcoreError(f"with --adapters, MODEL must be their base model, got the adapter {job.model}")
    if job.data is not None:
        load_samples(str(job.data))


def _sorted_out(job: Job, shared: dict[str, Any], folders: dict[str, Path]) -> tuple[list[Line], list[Task]]:
    """(lines on what is finished already or cannot be made, tasks for the rest)."""
    earlier = _earlier_lines(job.out / REPORT)
    lines, tasks = [], []
    for name, folder in folders.items():
        try:
            task = Task(name, folder, {**shared, "adapter": digest_of(folder)})
            if is_finished(job.out, name, task.recipe):
                lines.append(earlier.get(name) or line_of(job.out, name, job.edit_only))
            else:
                tasks.append(task)
        except (HftcoreError, OSError) as error:
            lines.append(failed(name, error))
    return lines, tasks


def _earlier_lines(report: Path) -> dict[str, Line]:
    """Name -> line of the adapters that an earlier run reports repaired; a line that was cut off is passed over."""
    lines = {}
    for text in report.read_text(encoding="utf-8").splitlines() if report.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["status"] == "repaired":
            lines[line["name"]] = line
    return lines


def _spread(work: Work, tasks: list[Task], workers: int, on_ray: bool) -> Iterator[Line]:
    if not tasks:
        return iter(())
    workers = min(workers, len(tasks))
    if on_ray:
        from hftcore.bindings.adapters.ray_crew import actors

        return actors(work, tasks, workers)
    if workers == 1:
        return alone(work, tasks)
    return processes(replace(work, threads=max(1, torch.get_num_threads() // workers)), tasks, workers)
