"""Edits on checkpoint folders: tensors are patched inside the `.safetensors` files, and no model is ever loaded."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.edit import Edit, TensorEdit, apply_tensor_, check_fingerprint, fingerprint, revert_tensor_
from hftcore.errors import HftcoreError
from hftcore.files import whole_folder

# the format's own limit
MAX_HEADER = 100_000_000
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16}
ITEM_BITS |= {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}

_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.[^.]+(\.weight)?$")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def apply_edit(edit: Edit, model: str | Path, out: str | Path) -> None:
    """Write to `out` a copy of the checkpoint folder `model` with the edit applied.

    What the edit does not change is copied byte for byte: other files, and all else in the files it changes.

    Args:
        edit: made on this model, in the dtype of its files.
        model: a folder with `.safetensors` files: a model (sharded or not) or a PEFT adapter.
        out: the folder to make; it must not exist, or be empty.

    Raises:
        FingerprintError: a tensor is not the one the edit was made for. Nothing is written.
        HftcoreError: a damaged file, an unknown tensor, another shape or dtype, `out` is taken. Nothing is written.
    """
    _patch(edit, Path(model), out, "apply")


def revert_edit(edit: Edit, model: str | Path, out: str | Path) -> None:
    """Write to `out` a copy of the edited checkpoint folder `model` as it was before the edit, byte for byte.

    Args and errors are those of `apply_edit`.
    """
    _patch(edit, Path(model), out, "revert")


def _patch(edit: Edit, model: Path, out: str | Path, action: Literal["apply", "revert"]) -> None:
    target = check_output(out, [model])
    states = "fingerprint_before", "fingerprint_after"
    before, after = states if action == "apply" else states[::-1]
    write = apply_tensor_ if action == "apply" else revert_tensor_
    stored = list_tensors(model)
    places = {name: _find(name, entry, stored) for name, entry in edit.tensors.items()}
    for name in Track(places, "check"):
        check_fingerprint(name, fingerprint(_tensor(places[name], "c")), edit.tensors[name], before)
    with whole_folder(target) as work:
        _copy(model, work)
        for name in Track(places, action):
            tensor = _tensor(replace(places[name], file=work / places[name].file.name), "r+")
            write(tensor, edit.tensors[name])
            check_fingerprint(name, fingerprint(tensor), edit.tensors[name], after)


def _tensor(place: StoredTensor, mode: Literal["c", "r+"]) -> Tensor:
    """The stored tensor itself: changes reach the file with mode "r+", and stay private with "c"."""
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype])
    region = np.memmap(place.file, np.uint8, mode, place.start, place.stop - place.start)
    return torch.frombuffer(region, dtype=DTYPES[place.dtype]).reshape(place.shape)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's contents, not its permissions, so that files that were read-only can be patched."""
    for item in sorted(source.iterdir()):
        if item.is_dir():
            if item.is_symlink():
                raise HftcoreError(f"{item} is a link to a folder; copy what it links to into its place")
            (target / item.name).mkdir()
            _copy(item, target / item.name)
        else:
            shutil.copyfile(item, target / item.name)


def _find(name: str, entry: TensorEdit, stored: Mapping[str, StoredTensor]) -> StoredTensor:
    """The stored tensor that a parameter's name in memory means, once the edit is known to fit it."""
    place = next((stored[candidate] for candidate in names_on_disk(name) if candidate in stored), None)
    if place is None:
        raise HftcoreError(
            f"the checkpoint has no tensor {name!r}, which this edit changes; if its files name or split tensors in "
            "another way than the model (fused experts), use edit.apply(model) and model.save_pretrained in Python"
        )
    dtype = str(DTYPES.get(place.dtype, place.dtype)).removeprefix("torch.")
    if (place.shape, dtype) != (tuple(entry.shape), entry.dtype):
        raise HftcoreError(
            f"{name} in {place.file.name} is {dtype} {list(place.shape)}, the edit was made on {entry.dtype} "
            f"{list(entry.shape)}; make the edit on the model in the dtype of its files"
        )
    *experts, rows, columns = place.shape if len(place.shape) in (2, 3) else (0, 0)
    if entry.transposed:
        rows, columns = columns, rows
    packed = (math.prod(experts) * rows, (columns + 7) // 8)
    if entry.mask.shape != packed or DTYPES[place.dtype] != entry.before.dtype:
        raise HftcoreError(f"the edit of {name!r} does not fit its own shape {list(entry.shape)}; copy the edit again")
    return place


def names_on_disk(name: str) -> list[str]:
    """Names under which a parameter may be stored, the likeliest first.

    PEFT leaves the adapter's name out; a base model inside PEFT has a prefix and wrapped layers; older checkpoints
    lack the prefix of the model's body.

    >>> names_on_disk("base_model.model.q_proj.lora_A.default.weight")[1]
    'base_model.model.q_proj.lora_A.weight'
    """
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return list(dict.fromkeys([name, _ADAPTER.sub(r".\1\2", name), plain, plain.partition(".")[2]]))


def list_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder: name -> place.

    Files are those the `.safetensors.index.json` names; without one, `model.safetensors` or
    `adapter_model.safetensors`; without these, every `.safetensors` file of the folder.

    Raises:
        HftcoreError: no folder, no such files, an index that does not fit them, a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HftcoreError(
            f"MODEL must be a checkpoint folder, got {folder}, which is not a folder; download hub models first"
        )
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise HftcoreError(f"{folder} has several index files ({', '.join(path.name for path in indexes)}); keep one")
    if indexes:
        return _indexed(folder, indexes[0])
    files = [path for name in ("model", "adapter_model") if (path := folder / f"{name}.safetensors").is_file()][:1]
    tensors: dict[str, StoredTensor] = {}
    for file in files or sorted(folder.glob("*.safetensors")):
        for name, place in read_header(file).items():
            if name in tensors:
                raise HftcoreError(
                    f"{name!r} is in both {tensors[name].file.name} and {file.name}; {folder} needs an index file"
                )
            tensors[name] = place
    if not tensors:
        raise HftcoreError(
            f"{folder} has no .safetensors files with tensors; convert the checkpoint with save_pretrained"
        )
    return tensors


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(map(os.fspath, where.values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HftcoreError(
            f"{index} is not an index with a `weight_map` ({type(error).__name__}); copy it again"
        ) from error
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name in names:
        if (
            not isinstance(name, str)
            or name != os.path.basename(name)
            or name in ("", ".", "..")
            or "\\" in name
            or "\0" in name
        ):
            raise HftcoreError(f"{index} names {name!r}; shards must be file names in the same folder")
        headers[name] = read_header(folder / name)
    for tensor, name in where.items():
        if tensor not in headers[name]:
            raise HftcoreError(
                f"{index} puts {tensor!r} into {name}, which does not hold it; copy the checkpoint again"
            )
    return {tensor: headers[name][tensor] for tensor, name in where.items()}


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one `.safetensors` file, from its header alone.

    Raises:
        HftcoreError: the file is missing, cut off, or not in the format.
    """
    file = Path(file)
    if not file.is_file():
        raise HftcoreError(f"{file} is missing; copy the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise HftcoreError(
                f"{file} is cut off or not a safetensors file ({size} bytes, header of {length}); copy it again"
            )
        raw = content.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _place(file, 8 + length, facts) for name, facts in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HftcoreError(f"{file} has a damaged header ({error or type(error).__name__}); copy it again") from error
    # a whole file has neither gaps nor overlaps, and ends with its last tensor
    position = 8 + length
    for place in sorted(tensors.values(), key=lambda place: (place.start, place.stop)):
        if place.start != position:
            raise HftcoreError(f"{file} has a damaged header (tensors overlap or leave gaps); copy it again")
        position = place.stop
    if position != size:
        raise HftcoreError(
            f"{file} is cut off or has bytes left over (tensors end at {position} of {size}); copy it again"
        )
    return tensors


def _place(file: Path, data: int, facts: Mapping[str, Any]) -> StoredTensor:
    dtype, shape, (start, stop) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("sizes and offsets must be whole numbers")
    if dtype in ITEM_BITS and (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {stop}")
    if stop < start:
        raise ValueError(f"offsets {start} to {stop}")
    return StoredTensor(file, dtype, tuple(shape), data + start, data + stop)
