"""Edits on checkpoint folders: tensors are patched on their way into a copy of the folder, and no model is ever loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bindings.checkpoints.manifest import EDIT, write_manifest
from hftcore.bindings.checkpoints.pieces import Piece, find_pieces
from hftcore.bindings.checkpoints.pieces import names_on_disk as names_on_disk
from hftcore.bindings.checkpoints.rewrite import rewrite_files, signature
from hftcore.bindings.checkpoints.shard import Changes
from hftcore.bindings.checkpoints.stored import StoredTensor, list_tensors
from hftcore.bindings.output import check_output
from hftcore.edit import CONFIG, Edit, TensorEdit, check_fingerprint, count_marks
from hftcore.errors import HftcoreError
from hftcore.ops.fingerprints import fingerprint_text
from hftcore.resumable import resumable_folder


def apply_edit(edit: Edit, model: str | Path, out: str | Path) -> None:
    """Write to `out` a copy of the checkpoint folder `model` with the edit applied.

    What the edit does not change is copied byte for byte: other files, and all else in the files it changes. Copies of the weights in
    other formats are left out, with a warning, and `hftcore_manifest.json` is added. Memory does not grow with the model when the edit
    was loaded from its folder. A killed call is continued by the same call.

    Args:
        edit: made on this model, in the dtype of its files.
        model: a folder with `.safetensors` files: a model (sharded or not) or a PEFT adapter.
        out: the folder to make; it must not exist, or be empty.

    Raises:
        FingerprintError: a tensor is not the one the edit was made for. Nothing is written.
        HftcoreError: a damaged file, an unknown tensor, another shape or dtype, `out` is taken. Nothing is written.
        OSError: the disk is full, for example; the same call continues once there is room.
    """
    _patch(edit, Path(model), out, "apply")


def revert_edit(edit: Edit, model: str | Path, out: str | Path) -> None:
    """Write to `out` a copy of the edited checkpoint folder `model` with its tensors as before the edit, bit for bit.

    If the edit is the one in `model/edit`, that folder is left out.

    Args and errors are those of `apply_edit`.
    """
    _patch(edit, Path(model), out, "revert")


def _patch(edit: Edit, model: Path, out: str | Path, action: Literal["apply", "revert"]) -> None:
    target = check_output(out, [model])
    states = "fingerprint_before", "fingerprint_after"
    needed, left = states if action == "apply" else states[::-1]
    stored = list_tensors(model)
    pieces, starts = locate(edit, stored)

    def change(piece: Piece, row: int, block: Tensor) -> None:
        entry = edit.tensors[piece.parameter]
        values = entry.after if action == "apply" else entry.before
        mask = entry.mask[piece.first + row : piece.first + row + block.shape[0]]
        if values is not None:
            stop = starts[piece] + ops.count_mask(mask)
            values = values[starts[piece] : stop]
            starts[piece] = stop
        ops.masked_put_(block, mask, values)

    def complete(parameter: str, before: int, after: int) -> None:
        entry = edit.tensors[parameter]
        dtype = getattr(torch, entry.dtype)
        check_fingerprint(parameter, fingerprint_text(dtype, entry.shape, before), entry, needed)
        check_fingerprint(parameter, fingerprint_text(dtype, entry.shape, after), entry, left)

    prints = {name: [entry.fingerprint_before, entry.fingerprint_after] for name, entry in edit.tensors.items()}
    # the Edit in the model's own folder says nothing about its weights once it is undone
    keeps_edit = action == "apply" or prints != _prints(model / EDIT / CONFIG)
    with resumable_folder(target, signature([model], {"action": action, "edit": prints})) as work:
        files = rewrite_files(model, stored, work, Changes(pieces, change, complete), keeps_edit=keeps_edit)
        work.finish("manifest", None, [write_manifest(work.folder, files)])


def _prints(config: Path) -> dict[str, list[str]] | None:
    """Parameter -> its fingerprints before and after, as the configuration of an Edit has them; None where there is no such Edit."""
    try:
        tensors = json.loads(config.read_text(encoding="utf-8"))["tensors"]
        return {name: [facts["fingerprint_before"], facts["fingerprint_after"]] for name, facts in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def locate(edit: Edit, stored: Mapping[str, StoredTensor]) -> tuple[list[Piece], dict[Piece, int]]:
    """The pieces an edit changes, and the number of each one's first value among those of its parameter.

    Raises:
        HftcoreError: the files do not hold a parameter as the edit has it.
    """
    starts: dict[Piece, int] = {}
    for name, entry in edit.tensors.items():
        pieces = find_pieces(name, entry.shape, entry.transposed, stored)
        _check_fit(name, entry, pieces)
        start = 0
        for piece in pieces:
            starts[piece] = start
            start += count_marks(entry.mask[piece.first : piece.first + piece.rows])
    return list(starts), starts


def _check_fit(name: str, entry: TensorEdit, pieces: Sequence[Piece]) -> None:
    """Refuse an edit of another dtype than the files', and one that contradicts itself."""
    dtype = str(pieces[0].dtype).removeprefix("torch.")
    if dtype != entry.dtype:
        raise HftcoreError(
            f"{name} in {pieces[0].file.name} is {dtype} {list(entry.shape)}, the edit was made on {entry.dtype}; "
            "make the edit on the model in the dtype of its files"
        )
    packed = (sum(piece.rows for piece in pieces), -(-pieces[0].columns // 8))
    if entry.mask.shape != packed or entry.before.dtype != pieces[0].dtype:
        raise HftcoreError(f"the edit of {name!r} does not fit its own shape {list(entry.shape)}; copy the edit again")
