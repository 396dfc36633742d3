"""Stages one after the other from one YAML file: alignment, fine-tuning, what comes after. What is done is not done again."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hftcore.bindings.commands import run_antidote
from hftcore.bindings.data import load_samples
from hftcore.bindings.evaluation.cells import key_of
from hftcore.bindings.evaluation.run import Options, identity
from hftcore.bindings.jobs import Job, check_measured
from hftcore.bindings.models_io import find_folder, is_adapter
from hftcore.bindings.output import check_output
from hftcore.bindings.recipe import Recipe, make_recipe, read_yaml
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.training import last_checkpoint, make_arguments, train
from hftcore.defenses.settings import check_number
from hftcore.errors import HftcoreError

ANTIDOTE = "antidote"
# fields of a Job that belong to the run, not to a stage
_OF_THE_RUN = ("model", "out", "base", "device", "dtype", "edit_only", "offload", "seconds")
_FILES = ("data", "energy", "reference")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: a `Recipe` to train by, or the options of `hftcore antidote`; `given` is what the file says, `files` what it reads."""

    method: str
    given: dict[str, Any]
    files: tuple[Path, ...]
    recipe: Recipe | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def makes_adapter(self) -> bool:
        """Whether it needs a plain model to put a new adapter on."""
        return self.recipe is not None and self.recipe.lora is not None


def read_pipeline(path: Path) -> tuple[str, list[Stage]]:
    """The model and the stages of a YAML file: `model`, and a list `stages` of recipes, each with its `method`.

    A stage's other keys are those of that method's recipe, or of the options of `hftcore antidote` with `_` for `-`. Paths are relative
    to the file.

    Raises:
        HftcoreError: what `make_recipe` refuses, by the number of the stage.
    """
    given = read_yaml(path)
    stages, model = given.get("stages"), given.get("model")
    if set(given) != {"model", "stages"} or not isinstance(model, str) or not isinstance(stages, list) or not stages:
        raise HftcoreError(
            f"--config {path} must hold model: FOLDER and stages: a list, got {', '.join(map(str, given))}; "
            "for a single method name METHOD and MODEL"
        )
    beside = path.parent / model
    read = [_stage(number, one, path) for number, one in enumerate(stages, 1)]
    for number, (before, after) in enumerate(itertools.pairwise(read), 2):
        if before.method == ANTIDOTE and after.makes_adapter:
            raise HftcoreError(
                f"{path}: stage {number} makes a new adapter on what {ANTIDOTE} left; leave its lora out"
            )
    return str(beside) if beside.is_dir() else model, read


def run_pipeline(config: Path, out: Path, device: str | None = None, dtype: str = "auto") -> dict[str, Any]:
    """Run the stages of a YAML file; each one's result is a folder in `out`, named after all that it depends on.

    The same call goes on where an earlier one ended: a stage whose settings, data and start are as before is taken from its folder, and
    one that was interrupted goes on from its last checkpoint if its recipe has `save_strategy`. A stage with `lora` puts a new adapter on
    what the stage before it left, which is merged for that; one without trains that stage's adapter on.

    Returns:
        out, result (the last stage's folder), and for each stage its method, folder and whether it was there already.

    Raises:
        HftcoreError: what the file, a stage or its data refuses; stages before it stay.
    """
    start, stages = read_pipeline(config)
    if stages[0].makes_adapter and is_adapter(start):
        raise HftcoreError(
            f"{config}: stage 1 makes a new adapter, and {start} is one; leave lora out, or merge it first"
        )
    if not out.is_dir():
        check_output(out, [start], "--out")
    done: list[dict[str, Any]] = []
    model, before = start, key_of(identity(start, Options(dtype=dtype)))
    for number, stage in enumerate(stages, 1):
        merges = number < len(stages) and stages[number].makes_adapter
        before = key_of(
            {"before": before, "merged": merges, "stage": stage.given, "files": [*map(_digest, stage.files)]}
        )
        target = out / f"{number}-{stage.method}-{before}"
        was_there = target.is_dir()
        if not was_there:
            _run(stage, model, target, merges, device, dtype)
        done.append({"method": stage.method, "out": str(target), "was_there": was_there})
        model = str(target)
    return {"out": str(out), "result": model, "stages": done}


def _run(stage: Stage, model: str, target: Path, merges: bool, device: str | None, dtype: str) -> None:
    if stage.recipe is not None:
        resume = last_checkpoint(target) is not None
        train(stage.recipe, stage.method, model, target, resume, device, dtype, merges)
        return
    options = dict(stage.options)
    ratio = options.pop("dense_ratio")
    run_antidote(Job(model, target, device=device, dtype=dtype, **options), ratio)


def _stage(number: int, given: Any, path: Path) -> Stage:
    if not isinstance(given, Mapping) or given.get("method") not in (*METHODS, ANTIDOTE):
        wanted = ", ".join((*METHODS, ANTIDOTE))
        raise HftcoreError(f"{path}: stage {number} must have a method out of {wanted}, got {given!r}")
    settings = {key: value for key, value in given.items() if key != "method"}
    try:
        if given["method"] == ANTIDOTE:
            return _antidote_stage(settings, path)
        recipe = make_recipe(given["method"], settings, path)
        make_arguments(recipe, path.parent, is_cpu=True)
        for file in recipe.data.values():
            load_samples(file)
    except HftcoreError as error:
        raise HftcoreError(f"stage {number}: {error}") from error
    if recipe.refusals is not None:
        settings |= {"refusals": recipe.refusals}
    return Stage(given["method"], settings, tuple(recipe.data.values()), recipe)


def _antidote_stage(settings: dict[str, Any], path: Path) -> Stage:
    known = {field.name for field in dataclasses.fields(Job)} - set(_OF_THE_RUN) | {"dense_ratio"}
    if unknown := settings.keys() - known:
        raise HftcoreError(f"{path}: method {ANTIDOTE} knows no key {min(unknown)!r}, only {', '.join(sorted(known))}")
    options = dict(settings)
    files = []
    for key in (key for key in _FILES if key in settings):
        options[key] = path.parent / str(settings[key])
        if not options[key].exists():
            raise HftcoreError(f"{path}: {key} must exist, got {options[key]}")
        files.append(options[key])
    if "data" in options:
        load_samples(options["data"])
    if "reference" in options:
        options["reference"] = str(options["reference"])
    ratio = options.pop("dense_ratio", 0.1)
    check_number("dense_ratio", ratio, 0, 1)
    check_measured(Job("", path, **options))
    options["dense_ratio"] = ratio
    return Stage(ANTIDOTE, settings, tuple(files), None, options)


def _digest(path: Path) -> str:
    """Of a file's bytes, or of a model's files."""
    if path.is_dir():
        return key_of(identity(str(find_folder(path)), Options()))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
