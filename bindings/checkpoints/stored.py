"""Where a checkpoint folder keeps its tensors, from the headers of its `.safetensors` files alone."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hftcore.errors import HftcoreError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = ".safetensors.index.json"
FIRST = ("model.safetensors", f"model{INDEX}", "adapter_model.safetensors")
# the format's own limit
MAX_HEADER = 100_000_000
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16}
ITEM_BITS |= {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def list_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder: name -> place.

    As in transformers, `model.safetensors` goes before the files that `model.safetensors.index.json` names; without either,
    `adapter_model.safetensors`, or another index; without these, every `.safetensors` file of the folder. Of the files that an index
    names every tensor counts, those that the index leaves out with a warning.

    Raises:
        HftcoreError: no folder, no such files, an index that does not fit them, a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HftcoreError(
            f"MODEL must be a checkpoint folder, got {folder}, which is not a folder; download hub models first"
        )
    for file in folder.glob("*.safetensors*"):
        check_link(file, folder)
    files = [path for name in FIRST if (path := folder / name).is_file()][:1]
    indexes = files or sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        raise HftcoreError(f"{folder} has several index files ({', '.join(path.name for path in indexes)}); keep one")
    if indexes and indexes[0].name.endswith(INDEX):
        return _indexed(folder, indexes[0])
    tensors: dict[str, StoredTensor] = {}
    for file in files or sorted(folder.glob("*.safetensors")):
        for name, place in read_header(file).items():
            if name in tensors:
                raise HftcoreError(
                    f"{name!r} is in both {tensors[name].file.name} and {file.name}; {folder} needs an index file"
                )
            tensors[name] = place
    if not tensors:
        pickles = [path.name for ending in PICKLES for path in sorted(folder.glob(f"*{ending}"))]
        only = f" but {pickles[0]}, a pickle, which could run anything and is not opened" if pickles else ""
        raise HftcoreError(
            f"{folder} has no .safetensors files with tensors{only}; convert the checkpoint with save_pretrained"
        )
    return tensors


def check_link(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of its folder, unless it is one into the blobs of the hub's cache.

    Raises:
        HftcoreError: it is such a link, or it leads nowhere.
    """
    if not file.is_symlink():
        return
    # not Path.resolve, which raises another error for links that lead in a circle
    home, real = (Path(os.path.realpath(path)) for path in (folder, file))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not real.is_file() or not any(place in real.parents for place in homes):
        raise HftcoreError(f"{file} is a link out of its folder, to {real}; copy that file into its place")


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(map(os.fspath, where.values())))
        if not names:
            raise ValueError("an empty one")
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
    seen: dict[str, str] = {}
    for name, tensors in headers.items():
        for tensor in tensors:
            if tensor in seen:
                raise HftcoreError(f"{tensor!r} is in both {seen[tensor]} and {name}; copy the checkpoint again")
            seen[tensor] = name
    for tensor, name in where.items():
        if tensor not in headers[name]:
            raise HftcoreError(
                f"{index} puts {tensor!r} into {name}, which does not hold it; copy the checkpoint again"
            )
    if unnamed := seen.keys() - where.keys():
        warnings.warn(
            f"{index} does not name {len(unnamed)} of the tensors in its files, such as {min(unnamed)!r} in "
            f"{seen[min(unnamed)]}; they are taken as the checkpoint's own, as from_pretrained takes them",
            stacklevel=1,
        )
    return {tensor: headers[name][tensor] for tensor, name in (where | seen).items()}


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
        header = json.loads(raw, object_pairs_hook=_once)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _place(file: Path, data: int, facts: Mapping[str, Any]) -> StoredTensor:
    dtype, shape, (start, stop) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("sizes and offsets must be whole numbers")
    if dtype in ITEM_BITS and (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {stop}")
    if stop < start:
        raise ValueError(f"offsets {start} to {stop}")
    return StoredTensor(file, dtype, tuple(shape), data + start, data + stop)
