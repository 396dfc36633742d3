"""Prune a checkpoint folder without loading it: the same mask, Edit and weights as in memory, bit for bit."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bindings.checkpoints.manifest import EDIT, describe_edit, write_manifest
from hftcore.bindings.checkpoints.pieces import Piece, find_pieces
from hftcore.bindings.checkpoints.rewrite import Changes, change_only, rewrite_files, signature
from hftcore.bindings.checkpoints.select import Selection
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import StoredTensor, list_tensors
from hftcore.bindings.checkpoints.threshold import Source
from hftcore.bindings.output import check_output
from hftcore.edit import Edit
from hftcore.edit_writer import EditWriter, Slot
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, find_layers
from hftcore.matching import energy_layers, refuse_unmeasured
from hftcore.ops.fingerprints import fingerprint_text
from hftcore.pattern import Pattern
from hftcore.resumable import Resumable, resumable_folder


def prune_folder(
    model: str | Path,
    energy: Energy | None,
    pattern: Pattern | str,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    score: Literal["wanda", "magnitude"] = "wanda",
    targets: Targets | None = None,
    exclude: Targets | None = None,
    edit_only: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Edit:
    """Write to `out` the pruned copy of a checkpoint folder, with its Edit in `out/edit`: what `hftcore.prune` does in memory.

    Weights are read, selected and written block by block, file by file, in the dtype of the files; other tensors and files are copied
    byte for byte, and `hftcore_manifest.json` is added. Memory does not grow with the model: some 85 MB beside what importing the
    libraries takes. A killed call is continued by the same call (see `hftcore.resumable.resumable_folder`).

    Args:
        model: a folder with `config.json` and `.safetensors` files, sharded or not; experts fused or one by one.
        energy: as for `hftcore.prune`. None for score "magnitude".
        pattern: a `Pattern` or its text.
        out: the folder to make; it must not exist, or be empty.
        reference: a folder of the same kind: the score is that of the difference to its weights, removed weights take its values.
        score: "wanda" or "magnitude".
        targets, exclude: as for `hftcore.prune`.
        edit_only: make `out` the folder of the Edit alone.
        recipe: what the Edit's recipe says beside or instead of what `hftcore.prune` would write.

    Returns:
        The Edit, its tensors mapped from `out`.

    Raises:
        HftcoreError: as `hftcore.prune`; a damaged or quantised checkpoint; `out` is taken. Nothing is left then.
        OSError: the disk is full, for example; the same call continues once there is room.
    """
    pattern = Pattern.of(pattern)
    folders = [Path(folder) for folder in (model, reference) if folder is not None]
    target = check_output(out, folders)
    stored = list_tensors(folders[0])
    layers = _layers(folders[0], energy, score, targets, exclude)
    pieces = {layer.tensor: _pieces(layer, stored) for layer in layers}
    others = None if reference is None else _others(layers, pieces, list_tensors(reference))
    measured = energy if score == "wanda" else None
    if measured is not None:
        refuse_unmeasured(measured)
    idle = [label for layer in layers for label in (measured.idle(layer.name).values() if measured else ())]
    sources = _sources(layers, pieces, others, measured, pattern)
    told: dict[str, Any] = {"method": "prune", "pattern": str(pattern), "score": score}
    if others is not None:
        told["reference"] = True
    if idle and pattern.invert:
        told["untouched"] = idle
    told |= recipe or {}
    choices = {"recipe": told, "edit_only": edit_only, "energy": _digest(sources)}
    with resumable_folder(target, signature(folders, choices)) as work:
        selection = Selection(sources, pattern, work.done.get("plan"))
        if selection.plan and "plan" not in work.done:
            work.finish("plan", selection.plan)
        slots = {layer.tensor: _slot(layer, pieces[layer.tensor], selection, others is not None) for layer in layers}
        with EditWriter(work.folder if edit_only else work.folder / EDIT, slots) as writer:
            changed = [piece for of in pieces.values() for piece in of]
            edit = _write(folders[0], stored, work, writer, selection, changed, told, edit_only)
    if idle:
        _tell(idle, pattern)
    return edit


def _write(
    source: Path,
    stored: Mapping[str, StoredTensor],
    work: Resumable,
    writer: EditWriter,
    selection: Selection,
    pieces: Sequence[Piece],
    recipe: dict[str, Any],
    edit_only: bool,
) -> Edit:
    """Fill the Edit, which is returned, and write the model unless only the Edit is wanted."""
    starts: dict[Piece, int] = {}
    filled: dict[str, int] = {}
    for piece in pieces:
        starts[piece] = filled.get(piece.parameter, 0)
        filled[piece.parameter] = starts[piece] + selection.changed(piece)
    fingerprints: dict[str, tuple[str, str]] = {}

    def change(piece: Piece, row: int, block: Tensor) -> None:
        mask, other = selection.mask(piece, row, block)
        before = ops.masked_take(block, mask)
        after = None if other is None else ops.masked_take(other, mask)
        ops.masked_put_(block, mask, after)
        writer.write(piece.parameter, "mask", piece.first + row, mask)
        writer.write(piece.parameter, "before", starts[piece], before)
        if after is not None:
            writer.write(piece.parameter, "after", starts[piece], after)
        starts[piece] += len(before)

    def complete(parameter: str, before: int, after: int) -> None:
        slot = writer.slots[parameter]
        fingerprints[parameter] = (
            fingerprint_text(slot.dtype, slot.shape, before),
            fingerprint_text(slot.dtype, slot.shape, after),
        )

    changes = Changes(pieces, change, complete, selection.pattern.block[0] if selection.pattern.block else 1)
    if edit_only:
        change_only(stored, work, changes, writer.settle)
        work.finish("edit", None, writer.finish(recipe, fingerprints))
        return writer.edit(recipe, fingerprints)
    files = rewrite_files(source, stored, work, changes, writer.settle, keeps_edit=False)
    written = writer.finish(recipe, fingerprints)
    files |= describe_edit(work.folder)
    work.finish("manifest", None, [*written, write_manifest(work.folder, files, EDIT)])
    return writer.edit(recipe, fingerprints)


def _layers(
    folder: Path, energy: Energy | None, score: str, targets: Targets | None, exclude: Targets | None
) -> list[Layer]:
    if score not in ("wanda", "magnitude"):
        raise HftcoreError(f"score must be 'wanda' or 'magnitude' on a checkpoint folder, got {score!r}")
    if energy is None and score == "wanda":
        raise HftcoreError("energy must be an Energy (from hftcore.calibrate) for score 'wanda', got None")
    model = load_skeleton(folder)
    if energy is not None:
        return energy_layers(model, energy, targets, exclude)
    return find_layers(model, "all-linear" if targets is None else targets, exclude)


def _pieces(layer: Layer, stored: Mapping[str, StoredTensor]) -> list[Piece]:
    return find_pieces(layer.tensor, getattr(layer.module, layer.parameter).shape, layer.transposed, stored)


def _others(
    layers: Sequence[Layer], pieces: Mapping[str, list[Piece]], stored: Mapping[str, StoredTensor]
) -> dict[str, list[Piece]]:
    """The reference's pieces of each parameter; they must be cut and typed as the model's."""
    found = {}
    for layer in layers:
        try:
            found[layer.tensor] = _pieces(layer, stored)
        except HftcoreError as error:
            raise HftcoreError(f"reference: {error}") from error
        for mine, other in zip(pieces[layer.tensor], found[layer.tensor], strict=False):
            if (mine.dtype, mine.first, mine.rows) != (other.dtype, other.first, other.rows):
                raise HftcoreError(
                    f"reference {layer.tensor!r} must be stored as the model's: {mine.dtype} [{mine.rows}, {mine.columns}], "
                    f"got {other.dtype} [{other.rows}, {other.columns}]; save both in the same way"
                )
    return found


def _sources(
    layers: Sequence[Layer],
    pieces: Mapping[str, list[Piece]],
    others: Mapping[str, list[Piece]] | None,
    energy: Energy | None,
    pattern: Pattern,
) -> list[Source]:
    """The pieces that take part, in position order; with `remove="highest"` those that no token reached do not."""
    sources = []
    for layer in layers:
        left_alone = energy.idle(layer.name) if energy is not None and pattern.invert else ()
        for number, piece in enumerate(pieces[layer.tensor]):
            if piece.expert in left_alone:
                continue
            if energy is None:
                measured = torch.ones(piece.columns)
            else:
                value = energy[layer.name].cpu()
                measured = value[piece.expert] if value.dim() > 1 else value
            sources.append(Source(piece, measured, others[layer.tensor][number] if others is not None else None))
    return sources


def _slot(layer: Layer, pieces: Sequence[Piece], selection: Selection, has_after: bool) -> Slot:
    return Slot(
        tuple(getattr(layer.module, layer.parameter).shape),
        pieces[0].dtype,
        layer.transposed,
        sum(piece.rows for piece in pieces),
        -(-pieces[0].columns // 8),
        sum(selection.changed(piece) for piece in pieces),
        has_after,
    )


def _digest(sources: Sequence[Source]) -> str:
    """Of the energies, and of what takes part."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.piece.parameter}:{source.piece.first}:".encode())
        digest.update(source.energy.float().numpy().tobytes())
    return digest.hexdigest()


def _tell(idle: Sequence[str], pattern: Pattern) -> None:
    fate = "was left as it was" if pattern.invert else "was pruned by position alone, as all its scores are 0"
    more = f" and {len(idle) - 8} more" if len(idle) > 8 else ""
    warnings.warn(f"what no token reached {fate}: {', '.join(idle[:8])}{more}", stacklevel=3)
