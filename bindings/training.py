"""Training from a recipe: a YAML file of data, adapter and settings, for any method of `hftcore.bindings.trainers.METHODS`."""

import dataclasses
import difflib
import functools
import inspect
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hftcore.bindings.data import load_samples
from hftcore.bindings.models_io import is_adapter, load_model, merged, save_model
from hftcore.bindings.output import check_output
from hftcore.bindings.trainers import METHODS, Method
from hftcore.errors import HftcoreError

# of the recipe itself; every other key is a field of the method's config
OWN_KEYS = ("max_length", "refusals", "lora")
PAPERS_LORA = {"r": 32, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
RESERVED = ("output_dir", "report_to", "disable_tqdm", "use_cpu")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to train with. `data` has a file for `train_dataset` and for each data set the method takes beside it."""

    method: Method
    data: dict[str, Path]
    settings: dict[str, Any]
    max_length: int = 256
    refusals: list[str] | None = None
    lora: dict[str, Any] | None = None


def read_recipe(name: str, path: Path) -> Recipe:
    """The recipe of a YAML file for a method; paths in it are relative to the file.

    Raises:
        HftcoreError: an unknown method or key, a missing data file, or a file that is not YAML.
    """
    if name not in METHODS:
        raise HftcoreError(f"METHOD must be one of {', '.join(METHODS)}, got {name!r}")
    given = read_yaml(path)
    return make_recipe(name, given, path)


def read_yaml(path: Path, option: str = "--config") -> Mapping[str, Any]:
    """The `key: value` lines of a file that an option names.

    Raises:
        HftcoreError: no such file, or one that holds no such lines.
    """
    import yaml

    if not path.is_file():
        raise HftcoreError(f"{option} must be an existing YAML file, got {path}")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HftcoreError(f"{option} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise HftcoreError(f"{option} {path} must hold `key: value` lines, got {type(given).__name__}")
    return given


@functools.cache
def _loader() -> Any:
    """YAML's safe loader, for which 5e-4 is a number as in YAML 1.2, and not a string as in YAML 1.1, which asks for 5.0e-4; and which
    refuses a key that stands twice, of which the first would be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {twice[0]!r} stands twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader


def make_recipe(name: str, given: Mapping[str, Any], source: Path) -> Recipe:
    """The recipe in a mapping that came from `source`, to whose folder its paths are relative; errors as `read_recipe`."""
    method = METHODS[name]
    trainer, config = method.load()
    beside = (*method.datasets, "harmful_dataset") if method.is_paired else method.datasets
    columns = {"train_data": "train_dataset"} | {_key(dataset): dataset for dataset in beside}
    fields = {field.name for field in dataclasses.fields(config) if field.init} - set(RESERVED)
    known = fields | columns.keys() | set(OWN_KEYS)
    if "refusals" not in inspect.signature(trainer.__init__).parameters:
        known.remove("refusals")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise HftcoreError(f"{source}: method {name} knows no key {key!r}{hint}")
    data = {}
    for key, dataset in columns.items():
        if key not in given:
            raise HftcoreError(f"{source}: method {name} needs {key}, a .jsonl file")
        data[dataset] = source.parent / str(given[key])
        if not data[dataset].is_file():
            raise HftcoreError(f"{source}: {key} must be an existing file, got {data[dataset]}")
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    for key in given.keys() & fields:
        _check_kind(key, given[key], kinds[key], source)
    return Recipe(
        method,
        data,
        {key: value for key, value in given.items() if key in fields},
        _length(given.get("max_length", 256), source),
        _refusals(given.get("refusals"), source),
        _lora(given.get("lora"), source),
    )


def run_training(
    name: str, model: str, config: Path, out: Path, resume: bool = False, device: str | None = None, dtype: str = "auto"
) -> dict[str, Any]:
    """Train a model or adapter by a recipe and write the result to `out`, which is whole or absent.

    With `save_strategy` in the recipe, checkpoints lie beside `out`, in `<out>.checkpoints`, and `resume` goes on from the last.

    Returns:
        method, out, steps, the mean loss and the log's entries.

    Raises:
        HftcoreError: what the recipe, the data or the trainer refuses, before the first step.
    """
    recipe = read_recipe(name, config)
    if recipe.lora is not None and is_adapter(model):
        raise HftcoreError(
            f"{config}: lora makes a new adapter, and {model} is one, which is trained on; leave lora out"
        )
    return train(recipe, name, model, out, resume, device, dtype)


def train(
    recipe: Recipe,
    name: str,
    model: str,
    out: Path,
    resume: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    merges: bool = False,
) -> dict[str, Any]:
    """As `run_training`, by a recipe that was read; `merges`: the adapter is merged into the model, and that is written."""
    from transformers import set_seed

    check_output(out, [model], "--out")
    loaded, tokenizer = load_model(model, device, dtype)
    # a new adapter begins with random factors
    set_seed(recipe.settings.get("seed", 42))
    with _checkpoints(recipe, out, resume) as (folder, checkpoint):
        trainer = make_trainer(recipe, _trainable(loaded, recipe.lora), tokenizer, folder)
        _check_trained(trainer)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained, edit = trainer.model.eval(), getattr(trainer, "edit", None)
    if merges and hasattr(trained, "peft_config"):
        # an edit of the factors says nothing about merged weights
        trained, edit = merged(trained), None
    # under torchrun all processes hold the result, and one writes it
    if trainer.args.should_save:
        save_model(trained, tokenizer, out, (model,), edit)
    return {
        "method": name,
        "out": str(out),
        "steps": int(result.global_step),
        "loss": float(result.training_loss),
        "log": trainer.state.log_history,
    }


def checkpoints_of(out: Path) -> Path:
    """Where the checkpoints of a training that writes to `out` lie."""
    return out.with_name(f"{out.name}.checkpoints")


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a training that writes to `out`: one that it was killed while writing does not count."""
    found = checkpoints_of(out).glob("checkpoint-*")
    whole = [path for path in found if path.name[11:].isdigit() and _is_whole(path)]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        # what transformers writes last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def make_arguments(recipe: Recipe, folder: Path, is_cpu: bool) -> Any:
    """The trainer's arguments, of the recipe's settings.

    Raises:
        HftcoreError: a setting that is out of range, or does not fit the others.
    """
    _, config_class = recipe.method.load()
    defaults = {"save_strategy": "no", "logging_steps": 10}
    own = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": not sys.stderr.isatty(), "use_cpu": is_cpu}
    try:
        args = config_class(**(defaults | recipe.settings | own))
    except HftcoreError:
        raise
    except (TypeError, ValueError) as error:
        raise HftcoreError(f"the training settings do not fit together: {' '.join(str(error).split())}") from error
    if args.eval_strategy != "no":
        raise HftcoreError(
            f"eval_strategy must be no, as a recipe has no data to evaluate on, got {args.eval_strategy.value}; leave it out"
        )
    return args


def make_trainer(recipe: Recipe, model: Any, tokenizer: Any, folder: Path) -> Any:
    """The trainer of a recipe; checkpoints go to `folder`."""
    from transformers.trainer_callback import PrinterCallback

    from hftcore.bindings.trainers.data import tokenize
    from hftcore.bindings.trainers.pairs import pair_samples

    trainer_class, _ = recipe.method.load()
    args = make_arguments(recipe, folder, next(model.parameters()).device.type == "cpu")
    data: dict[str, Any] = {
        dataset: tokenize(load_samples(str(path)), tokenizer, recipe.max_length)
        for dataset, path in recipe.data.items()
    }
    if recipe.method.is_paired:
        data["train_dataset"] = pair_samples(data["train_dataset"], data.pop("harmful_dataset"))
    refusals = {} if recipe.refusals is None else {"refusals": recipe.refusals}
    trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **data, **refusals)
    # it prints every log entry to stdout, which is the command's
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainable(model: Any, lora: dict[str, Any] | None) -> Any:
    """The model with what is to be trained requiring gradients: its adapter, a new one, or all of it."""
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        try:
            return get_peft_model(model, LoraConfig(**lora))
        except (TypeError, ValueError) as error:
            raise HftcoreError(f"lora does not fit the model: {' '.join(str(error).split())}") from error
    has_adapter = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not has_adapter or ".lora_" in name or ".modules_to_save." in name)
    return model


def _check_trained(trainer: Any) -> None:
    """Refuse what would fail after the last step, and warn of what would train little."""
    trained, is_adapter = trainer.parameters, hasattr(trainer.model, "peft_config")
    outside = [name for name in trained if ".lora_" not in name] if is_adapter and hasattr(trainer, "edit") else []
    if outside:
        raise HftcoreError(
            f"{type(trainer).__name__} saves an Edit, which beside an adapter holds LoRA factors alone, and {outside[0]} is trained too; "
            "leave modules_to_save and bias out of lora"
        )
    half = next((parameter.dtype for parameter in trained.values() if parameter.dtype.itemsize < 4), None)
    if half is not None:
        warnings.warn(
            f"the trained weights are {str(half).removeprefix('torch.')}, in which steps smaller than half a unit in a weight's last place "
            "are lost; --dtype float32 keeps them (with bf16: true in the recipe it computes in bfloat16 all the same)",
            stacklevel=2,
        )


@contextmanager
def _checkpoints(recipe: Recipe, out: Path, resume: bool) -> Iterator[tuple[Path, Path | None]]:
    """Where checkpoints go, and the one to go on from."""
    if recipe.settings.get("save_strategy", "no") == "no":
        if resume:
            raise HftcoreError("--resume needs checkpoints; set save_strategy in the recipe")
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary), None
        return
    folder, last = checkpoints_of(out), last_checkpoint(out)
    if resume != (last is not None):
        wanted = "has no checkpoint to resume from" if resume else "holds checkpoints of an earlier run"
        raise HftcoreError(f"{folder} {wanted}; {'leave --resume out' if resume else 'give --resume, or remove it'}")
    try:
        yield folder, last
    finally:
        # the trainer makes it before its first step, which a run that is refused never takes
        with suppress(OSError):
            folder.rmdir()


def _key(dataset: str) -> str:
    return dataset.removesuffix("_dataset") + "_data"


def _check_kind(key: str, value: Any, kind: Any, source: Path) -> None:
    """Refuse a value of another kind than the field's where that is a number or a switch."""
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    is_fitting = isinstance(value, int | float if kind is float else kind) if kind in wanted else True
    if not is_fitting or (kind in (int, float) and isinstance(value, bool)):
        raise HftcoreError(f"{source}: {key} must be {wanted[kind]}, got {value!r}")


def _length(value: Any, source: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HftcoreError(f"{source}: max_length must be a whole number of at least 1, got {value!r}")
    return value


def _refusals(value: Any, source: Path) -> list[str] | None:
    """A list of sentences, or a text file of one a line."""
    if isinstance(value, str):
        path = source.parent / value
        if not path.is_file():
            raise HftcoreError(f"{source}: refusals must be sentences or an existing text file, got {path}")
        value = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if value is not None and not (isinstance(value, list) and value and all(isinstance(line, str) for line in value)):
        raise HftcoreError(f"{source}: refusals must be sentences, at least one, or a text file of them, got {value!r}")
    return value


def _lora(value: Any, source: Path) -> dict[str, Any] | None:
    """PEFT's settings over those of the papers; true for the papers' own."""
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Mapping):
        raise HftcoreError(f"{source}: lora must be true or settings of peft.LoraConfig, got {value!r}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise HftcoreError("lora needs peft; pip install peft") from error
    lora = PAPERS_LORA | ({} if value is True else dict(value))
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if unknown := [str(key) for key in lora if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise HftcoreError(
            f"{source}: lora knows no key {unknown[0]!r}{f'; did you mean {near[0]}?' if near else ''}, see peft.LoraConfig"
        )
    return lora
