"""One worker's part: the base model in memory, and on it one adapter after the other, repaired by Antidote and written."""

import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.adapters.base import Base
from hftcore.bindings.adapters.recipes import Line, Recipe, digest_of, failed, note, repaired
from hftcore.bindings.commands import antidote_loaded
from hftcore.bindings.data import load_samples
from hftcore.bindings.jobs import Job, Loaded, batches_of
from hftcore.bindings.models_io import ADAPTER, TOKENIZER_FILES, load_tokenizer, refuse_base_weights
from hftcore.defenses.antidote import default_targets
from hftcore.errors import HftcoreError
from hftcore.layers import find_layers

# files beside a tokenizer that say nothing about it
OTHER_FILES = (ADAPTER, "trainer_state.json", "recipe.json")


@dataclass(frozen=True)
class Work:
    """What is the same for all adapters.

    Fields:
        job: `model` is the base model, `out` the folder of all results.
        dense_ratio: of Antidote.
        threads: of PyTorch in each worker; None for as many as it takes by itself.
    """

    job: Job
    dense_ratio: float
    threads: int | None = None


@dataclass(frozen=True)
class Task:
    """One adapter: the name of its result, its folder, and all that decides the result, as JSON values."""

    name: str
    folder: Path
    recipe: Recipe


class Workshop:
    """The base model and the tokenized data, ready for adapters.

    Raises:
        HftcoreError: the base model or the data cannot be read.
    """

    def __init__(self, work: Work) -> None:
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        self.work = work
        self.samples = load_samples(str(work.job.data)) if work.job.data is not None else []
        self.base = Base(work.job.model, work.job.device, work.job.dtype)
        self._tokenized: dict[str, tuple[Any, list[dict[str, Tensor]]]] = {}

    def repair(self, task: Task) -> Line:
        """Repair one adapter as `hftcore antidote ADAPTER --base BASE` does; returns its line of the report, whatever happens."""
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                result = self._repair(task)
            except Exception as error:  # whatever is wrong with one adapter, the others are repaired
                line = failed(task.name, error, round(time.perf_counter() - started, 3))
            else:
                seconds = round(time.perf_counter() - started, 3)
                line = repaired(task.name, result["sparsity"], result["removed"], result["size"], seconds)
        said = [" ".join(str(item.message).split()) for item in caught if issubclass(item.category, UserWarning)]
        return {**line, "warnings": said} if said else line

    def _repair(self, task: Task) -> dict[str, Any]:
        if not (task.folder / ADAPTER).is_file():
            raise HftcoreError(f"{task.folder} is no adapter: it has no {ADAPTER}")
        shared = self.work.job
        job = replace(shared, model=str(task.folder), base=shared.model, out=shared.out / task.name, seconds={})
        with self.base.adapted(task.folder) as model:
            targets = default_targets(model) if job.targets is None else job.targets
            refuse_base_weights([layer.tensor for layer in find_layers(model, targets, job.exclude)])
            tokenizer, batches = self._tokens(job, task.folder)
            note(shared.out, task.name, task.recipe)
            harmful = batches if job.score == "wanda" else None
            return antidote_loaded(job, Loaded(model, tokenizer, self.samples), harmful, self.work.dense_ratio)

    def _tokens(self, job: Job, folder: Path) -> tuple[Any, list[dict[str, Tensor]]]:
        """The tokenizer that comes with an adapter, or the base model's, and the data in its tokens; those of the last are kept."""
        own = any((folder / name).is_file() for name in TOKENIZER_FILES)
        key = digest_of(folder, (".json", ".jinja", ".model", ".txt"), without=OTHER_FILES) if own else ""
        if key not in self._tokenized:
            tokenizer = load_tokenizer([folder]) if own else self.base.tokenizer
            batches = list(batches_of(job, Loaded(None, tokenizer, self.samples))) if self.samples else []
            self._tokenized = {key: (tokenizer, batches)}
        return self._tokenized[key]
