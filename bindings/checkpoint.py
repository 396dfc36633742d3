"""Edits on checkpoint folders: tensors are patched inside the `.safetensors` files, and no model is ever loaded."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.bindings.stored import DTYPES, StoredTensor, list_tensors
from hftcore.edit import Edit, TensorEdit, apply_tensor_, check_fingerprint, fingerprint, revert_tensor_
from hftcore.errors import HftcoreError
from hftcore.files import whole_folder

_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.[^.]+(\.weight)?$")
# how fused experts are split in files: (their module's name in memory, on disk), and the matrices that follow each other in one
_EXPERTS = (
    (("mlp.experts", "mlp.experts"), {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    (("mlp.experts", "block_sparse_moe.experts"), {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)


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
    for name, entry in Track(edit.tensors.items(), "check"):
        whole = _fused([_tensor(part, "c") for part in places[name]], entry)
        check_fingerprint(name, fingerprint(whole), entry, before)
    with whole_folder(target) as work:
        _copy(model, work)
        for name, entry in Track(edit.tensors.items(), action):
            parts = [_tensor(replace(part, file=work / part.file.name), "r+") for part in places[name]]
            whole = _fused(parts, entry)
            write(whole, entry)
            if len(parts) > 1:
                rows = whole.reshape(-1, whole.shape[-1]).split([len(part) for part in parts])
                for part, changed in zip(parts, rows, strict=True):
                    part.copy_(changed)
            check_fingerprint(name, fingerprint(_fused(parts, entry)), entry, after)


def _fused(parts: list[Tensor], entry: TensorEdit) -> Tensor:
    """The tensor as the model holds it: the stored one itself, or a copy of the experts' matrices in one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts).reshape(entry.shape)


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


def _find(name: str, entry: TensorEdit, stored: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """Where a parameter lies, in one piece or as the matrices of its experts, once the edit is known to fit it."""
    single = next((stored[candidate] for candidate in names_on_disk(name) if candidate in stored), None)
    parts = [single] if single else _split_experts(name, entry, stored)
    if not parts:
        raise HftcoreError(
            f"the checkpoint has no tensor {name!r}, which this edit changes; if its files name or split tensors in "
            "another way than the model, use edit.apply(model) and model.save_pretrained in Python"
        )
    # experts' matrices, one below the other, fill the fused parameter
    shape = single.shape if single else (sum(part.shape[0] for part in parts), parts[0].shape[1])
    wanted = tuple(entry.shape) if single else (math.prod(entry.shape[:-1]), entry.shape[-1])
    dtypes = {str(DTYPES.get(part.dtype, part.dtype)).removeprefix("torch.") for part in parts}
    if shape != wanted or dtypes != {entry.dtype} or len({part.shape[1:] for part in parts}) != 1:
        raise HftcoreError(
            f"{name} in {parts[0].file.name} is {' and '.join(sorted(dtypes))} {list(shape)}, the edit was made on "
            f"{entry.dtype} {list(wanted)}; make the edit on the model in the dtype of its files"
        )
    *experts, rows, columns = entry.shape if len(entry.shape) in (2, 3) else (0, 0)
    if entry.transposed:
        rows, columns = columns, rows
    packed = (math.prod(experts) * rows, (columns + 7) // 8)
    if entry.mask.shape != packed or str(entry.before.dtype) != f"torch.{entry.dtype}":
        raise HftcoreError(f"the edit of {name!r} does not fit its own shape {list(entry.shape)}; copy the edit again")
    return parts


def _split_experts(name: str, entry: TensorEdit, stored: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """The stored matrices of fused experts, expert by expert; empty if the files do not hold them all."""
    module, _, parameter = name.rpartition(".")
    if len(entry.shape) != 3 or entry.transposed:
        return []
    for (in_memory, on_disk), matrices in _EXPERTS:
        prefix = module.removesuffix(in_memory) + on_disk
        names = [
            f"{prefix}.{expert}.{part}.weight"
            for expert in range(entry.shape[0])
            for part in matrices.get(parameter, ())
        ]
        if names and all(part in stored and len(stored[part].shape) == 2 for part in names):
            return [stored[part] for part in names]
    return []


def names_on_disk(name: str) -> list[str]:
    """Names under which a parameter may be stored, the likeliest first.

    PEFT leaves the adapter's name out; a base model inside PEFT has a prefix and wrapped layers; older checkpoints
    lack the prefix of the model's body.

    >>> names_on_disk("base_model.model.q_proj.lora_A.default.weight")[1]
    'base_model.model.q_proj.lora_A.weight'
    """
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return list(dict.fromkeys([name, _ADAPTER.sub(r".\1\2", name), plain, plain.partition(".")[2]]))
