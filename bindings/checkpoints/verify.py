"""Is a folder that was written still what it was, and does its Edit lead back?"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from hftcore import ops
from hftcore.bindings.checkpoints.blocks import Blocks, rows_of
from hftcore.bindings.checkpoints.edits import locate
from hftcore.bindings.checkpoints.manifest import describe, read_manifest
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.bindings.progress import Track
from hftcore.edit import Edit
from hftcore.errors import HftcoreError
from hftcore.ops.fingerprints import fingerprint_sum, fingerprint_text

WEIGHTS = re.compile(r".*\.safetensors|.*\.index\.json|(pytorch|adapter)_model.*\.bin")


def verify_folder(folder: str | Path) -> dict[str, Any]:
    """Read every byte of a folder, compare it with its manifest, and undo its Edit block by block in memory.

    Returns:
        {"files": how many, "tensors": how many, "bytes": how many, "problems": [one line each]}; no problems means that the folder
        is whole and as it was written. Files the manifest does not know are left alone, but for weights: what loads the folder might
        take those instead.

    Raises:
        HftcoreError: no such folder, an unfinished one, or no readable manifest.
    """
    target = Path(os.path.abspath(folder))
    journal = target.with_name(f".{target.name}.journal")
    if not target.is_dir():
        unfinished = f": it is not finished ({journal.name} is there); run the same command again"
        raise HftcoreError(f"{folder} is not a folder{unfinished if journal.exists() else ''}")
    manifest = read_manifest(target)
    files = manifest["files"]
    problems: list[str] = []
    for name, wanted in Track(files.items(), "verify"):
        problems += _changes(target / name, name, wanted)
    names = (file.name for file in sorted(target.iterdir()) if WEIGHTS.fullmatch(file.name))
    problems += [
        f"{name} is not of this checkpoint; what loads the folder might take it" for name in names if name not in files
    ]
    if manifest["edit"] and not problems:
        problems = _wrong_turns(target, target / manifest["edit"])
    return {
        "files": len(files),
        "tensors": sum(len(facts.get("tensors", ())) for facts in files.values()),
        "bytes": sum(facts["bytes"] for facts in files.values()),
        "problems": problems,
    }


def _changes(file: Path, name: str, wanted: dict[str, Any]) -> list[str]:
    """How a file differs from what the manifest says of it."""
    if not file.is_file():
        return [f"{name} is missing"]
    if file.stat().st_size != wanted["bytes"]:
        return [f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"]
    if wanted.keys() == {"bytes"}:
        return []
    try:
        facts = describe(file)
    except HftcoreError as error:
        return [str(error)]
    changed = [f"{name}: its {key} differs" for key in ("sha256", "header") if facts.get(key) != wanted.get(key)]
    have, want = facts.get("tensors", {}), wanted.get("tensors", {})
    return changed + [f"{name}: tensor {key!r} differs" for key in sorted(want) if have.get(key) != want[key]]


def _wrong_turns(folder: Path, place: Path) -> list[str]:
    """The parameters whose weights are not those the Edit leaves, or which it does not lead back to those it was made on."""
    try:
        edit = Edit.load(place)
        pieces, starts = locate(edit, list_tensors(folder))
    except HftcoreError as error:
        return [str(error)]
    sums = {name: [0, 0] for name in edit.tensors}
    problems = []
    blocks = [rows for piece in pieces for rows in rows_of(piece)]
    for rows, data in zip(Track(blocks, "undo"), Blocks(2).read(rows.span for rows in blocks), strict=True):
        piece = rows.piece
        entry = edit.tensors[piece.parameter]
        row = 0 if piece.transposed else rows.first
        block, stored = rows.of(data), data.view(piece.dtype)
        first = (piece.first + row) * piece.columns
        mask = entry.mask[piece.first + row : piece.first + row + block.shape[0]]
        left = ops.masked_take(block, mask)
        start, starts[piece] = starts[piece], starts[piece] + len(left)
        wanted = torch.zeros_like(left) if entry.after is None else entry.after[start : starts[piece]]
        if not torch.equal(_bits(left), _bits(wanted)):
            problems.append(f"{piece.parameter}: its weights are not those that the Edit leaves")
            continue
        sums[piece.parameter][1] += fingerprint_sum(stored, first)
        ops.masked_put_(block, mask, entry.before[start : starts[piece]])
        sums[piece.parameter][0] += fingerprint_sum(stored, first)
    for name, (before, after) in sums.items():
        entry = edit.tensors[name]
        found = [fingerprint_text(getattr(torch, entry.dtype), entry.shape, total) for total in (before, after)]
        if found != [entry.fingerprint_before, entry.fingerprint_after]:
            problems.append(f"{name}: the Edit does not lead back to the weights it was made on")
    return list(dict.fromkeys(problems))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)
