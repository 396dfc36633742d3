"""Recipes of trainings: a YAML file of data, adapter and settings, read and checked for any method of `trainers.METHODS`."""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
