"""What is pruned in a checkpoint's files, and the writing of the result."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bindings.checkpoints.manifest import EDIT, describe_edit, write_manifest
from hftcore.bindings.checkpoints.pieces import Piece, find_pieces
from hftcore.bindings.checkpoints.rewrite import change_only, rewrite_files, signature
from hftcore.bindings.checkpoints.select import Selection
from hftcore.bindings.checkpoints.shard import Changes
from hftcore.bindings.checkpoints.stored import StoredTensor, list_tensors
from hftcore.bindings.checkpoints.threshold import Source
from hftcore.bindings.output import check_output
from hftcore.edit import Edit
from hftcore.edit_writer import EditWriter, Slot
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer
from hftcore.ops.fingerprints import fingerprint_text
from hftcore.pattern import Pattern
from hftcore.resumable import Resumable, resumable_folder

# ahead(work, changes, selection, beside): finish steps of `work` with what `changes` says; `beside` as for `rewrite_files`
Ahead = Callable[[Resumable, Changes, Selection, Callable[[], Sequence[Path]]], None]


class Pruning:
    """What is pruned, and where the model's files and those of its reference have it.

    Args:
        model, reference, pattern, out, edit_only: as for `prune_folder`.
        find: the layers of a checkpoint folder with these tensors.

    Fields:
        layers: those to prune.
        pieces: tensor name -> where it lies; `others` the same in the reference.
        stored: the tensors of the model's files.
    """

    def __init__(
        self,
        model: str | Path,
        reference: str | Path | None,
        find: Callable[[Path, Mapping[str, StoredTensor]], list[Layer]],
        pattern: Pattern,
        out: str | Path,
        edit_only: bool,
    ) -> None:
        self._folders = [Path(folder) for folder in (model, reference) if folder is not None]
        self._target = check_output(out, self._folders)
        self._pattern, self.edit_only = pattern, edit_only
        self.stored = list_tensors(self._folders[0])
        self.layers = find(self._folders[0], self.stored)
        self.pieces = {layer.tensor: _pieces(layer, self.stored) for layer in self.layers}
        self.others = None if reference is None else _others(self.layers, self.pieces, list_tensors(reference))

    def sources(self, energy: Energy | None) -> list[Source]:
        """The pieces of the layers that `energy` knows that take part, in position order; without one all, as if energies were 1."""
        layers = self.layers if energy is None else [layer for layer in self.layers if layer.name in energy]
        return _sources(layers, self.pieces, self.others, energy, self._pattern)

    def recipe(self, score: str, untouched: list[str]) -> dict[str, Any]:
        """What the Edit's recipe says; `untouched` is what no token reached, where that is left as it was."""
        told: dict[str, Any] = {"method": "prune", "pattern": str(self._pattern), "score": score}
        if self.others is not None:
            told["reference"] = True
        if untouched:
            told["untouched"] = untouched
        return told

    def run(
        self, sources: Sequence[Source], recipe: dict[str, Any], facts: Mapping[str, Any], ahead: Ahead | None = None
    ) -> Edit:
        """Write the result.

        Args:
            sources: what takes part.
            recipe: that of the Edit.
            facts: what else another result would follow from (JSON values).
            ahead: writes some of the files before the others are, and settles the energies if `sources` has none yet.
        """
        choices = {"recipe": recipe, "edit_only": self.edit_only, **facts}
        with resumable_folder(self._target, signature(self._folders, choices)) as work:
            selection = Selection(sources, self._pattern, self._target.parent, work.done.get("plan"))
            if selection.plan and "plan" not in work.done:
                work.finish("plan", selection.plan)
            slots = {
                layer.tensor: _slot(layer, self.pieces[layer.tensor], selection, self.others is not None)
                for layer in self.layers
            }
            with EditWriter(work.folder if self.edit_only else work.folder / EDIT, slots) as writer:
                return self._write(work, writer, selection, recipe, ahead)

    def _write(
        self, work: Resumable, writer: EditWriter, selection: Selection, recipe: dict[str, Any], ahead: Ahead | None
    ) -> Edit:
        """Fill the Edit, which is returned, and write the model unless only the Edit is wanted."""
        pieces = [piece for of in self.pieces.values() for piece in of]
        starts: dict[Piece, int] = {}
        filled: dict[str, int] = {}
        for piece in pieces:
            starts[piece] = filled.get(piece.parameter, 0)
            filled[piece.parameter] = starts[piece] + selection.changed(piece)
        places: dict[Piece, int] = {}
        fingerprints: dict[str, tuple[str, str]] = {}

        def change(piece: Piece, row: int, block: Tensor) -> None:
            mask, other = selection.mask(piece, row, block)
            before = ops.masked_take(block, mask)
            after = None if other is None else ops.masked_take(other, mask)
            ops.masked_put_(block, mask, after)
            place = starts[piece] if row == 0 else places[piece]
            writer.write(piece.parameter, "mask", piece.first + row, mask)
            writer.write(piece.parameter, "before", place, before)
            if after is not None:
                writer.write(piece.parameter, "after", place, after)
            places[piece] = place + len(before)

        def complete(parameter: str, before: int, after: int) -> None:
            slot = writer.slots[parameter]
            fingerprints[parameter] = (
                fingerprint_text(slot.dtype, slot.shape, before),
                fingerprint_text(slot.dtype, slot.shape, after),
            )

        changes = partial(Changes, pieces, change, row_step=self._pattern.block[0] if self._pattern.block else 1)
        if ahead is not None:
            # parameters are complete when all files are, and those are counted below
            ahead(work, changes(complete=lambda *_: None), selection, writer.settle)
        if self.edit_only:
            change_only(self.stored, work, changes(complete=complete), writer.settle)
            work.finish("edit", None, writer.finish(recipe, fingerprints))
            return writer.edit(recipe, fingerprints)
        files = rewrite_files(
            self._folders[0], self.stored, work, changes(complete=complete), writer.settle, keeps_edit=False
        )
        written = writer.finish(recipe, fingerprints)
        files |= describe_edit(work.folder)
        work.finish("manifest", None, [*written, write_manifest(work.folder, files, EDIT)])
        return writer.edit(recipe, fingerprints)


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
    ones: dict[int, Tensor] = {}
    for layer in layers:
        left_alone = energy.idle(layer.name) if energy is not None and pattern.invert else ()
        for number, piece in enumerate(pieces[layer.tensor]):
            if piece.expert in left_alone:
                continue
            if energy is None:
                measured = ones.setdefault(piece.columns, torch.ones(piece.columns))
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


def digest_sources(sources: Sequence[Source]) -> str:
    """Of the energies, and of what takes part."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.piece.parameter}:{source.piece.first}:".encode())
        digest.update(source.energy.float().numpy().tobytes())
    return digest.hexdigest()
