"""Which pruning commands need no model in memory, and how they run."""

from typing import Any

from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.jobs import Job
from hftcore.bindings.models_io import find_folder, is_adapter
from hftcore.bindings.output import check_output
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.pattern import Pattern


def streams(job: Job) -> bool:
    """Whether a job that prunes runs on the files: nothing is to be measured, and nothing asks for a model in memory.

    So `--data`, `--score random`, `--device`, `--dtype`, `--base` and adapters are for models in memory.
    """
    measured = job.energy is not None if job.score == "wanda" else job.score == "magnitude" and job.energy is None
    asks = job.data is not None or job.device is not None or job.dtype != "auto" or job.base is not None
    adapters = is_adapter(job.model) or (job.reference is not None and is_adapter(job.reference))
    return measured and not asks and not adapters


def prune_streamed(job: Job, pattern: Pattern, recipe: dict[str, Any]) -> Edit:
    """Carry out a job for which `streams` is true; `recipe` as for `prune_folder`."""
    check_output(job.out, [folder for folder in (job.model, job.reference) if folder], "--out")
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
