"""Measure and prune a checkpoint folder block by block: a block's weights are pruned in the memory they were measured in."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bindings.checkpoints.offload import Offloaded
from hftcore.bindings.checkpoints.prune import prune_folder, tell_idle
from hftcore.bindings.checkpoints.pruning import Pruning, digest_sources
from hftcore.bindings.checkpoints.select import Selection
from hftcore.bindings.checkpoints.shard import Changes, Shard
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import StoredTensor
from hftcore.bindings.checkpoints.threshold import Source
from hftcore.calibration import Batch, prepared
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, find_layers
from hftcore.matching import refuse_unmeasured
from hftcore.pattern import Pattern
from hftcore.resumable import Resumable


def prune_measuring(
    model: str | Path,
    batches: Iterable[Batch],
    pattern: Pattern | str,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    tokens: str = "all",
    edit_only: bool = False,
    recipe: Mapping[str, Any] | None = None,
    device: str | None = None,
    scratch: str | Path | None = None,
) -> Edit:
    """What `prune_folder` writes and returns with the energy that `calibrate_folder` measures, byte for byte.

    With scope "row" (so also "n:m" and rows of blocks) every weight inside the model's blocks is read once: it is pruned once its block is
    measured. A killed call is continued by the same one, which measures again and writes no finished file a second time. The
    other scopes need all energies first, and so does `remove="highest"` where no token reaches some expert, as then less is
    removed: there the files are read again.

    Args:
        model, pattern, out, reference, edit_only, recipe: as for `prune_folder`.
        batches, targets, exclude, tokens, device, scratch: as for `calibrate_folder`.

    Raises:
        HftcoreError, OSError: as these two.
    """
    pattern = Pattern.of(pattern)
    offloaded = Offloaded(model, targets, exclude, tokens, device, "auto")
    held = [inputs for inputs, _ in prepared(offloaded.runner, batches)]

    def find(folder: Path, _: Mapping[str, StoredTensor]) -> list[Layer]:
        return find_layers(load_skeleton(folder), targets, exclude)

    energy = None
    if pattern.scope == "row":
        pruning = Pruning(model, reference, find, pattern, out, edit_only)
        told = pruning.recipe("wanda", []) | dict(recipe or {})
        walk = _Walk(pruning, offloaded, held, scratch, pattern.invert)
        try:
            edit = pruning.run(pruning.sources(None), told, {"batches": _digest(held), "tokens": tokens}, walk)
        except _UnreachedError as found:
            energy = found.energy
        else:
            tell_idle(walk.idle, pattern)
            return edit
    if energy is None:
        energy = offloaded.measure(held, scratch)
    return prune_folder(model, energy, pattern, out, reference=reference, edit_only=edit_only, recipe=recipe)


class _UnreachedError(HftcoreError):
    """No token reached what would have been pruned, so the Edit is laid out in another way; nothing is left of it."""

    def __init__(self, energy: Energy) -> None:
        super().__init__("no token reached some of what is to be pruned")
        self.energy = energy


class _Walk:
    """Writes the files of a result while the model is measured, and leaves in `idle` what no token reached.

    A file is finished when all blocks are measured that hold some of it. What no block held is read then.
    """

    def __init__(
        self,
        pruning: Pruning,
        offloaded: Offloaded,
        batches: Sequence[Batch],
        scratch: str | Path | None,
        inverts: bool,
    ) -> None:
        self._pruning, self._offloaded, self._batches, self._scratch = pruning, offloaded, batches, scratch
        self._inverts = inverts
        self.idle: list[str] = []

    def __call__(
        self, work: Resumable, changes: Changes, selection: Selection, beside: Callable[[], Sequence[Path]]
    ) -> None:
        held, due = self._places(changes)
        shards: dict[Path, Shard] = {}
        sources: dict[Path, list[Source]] = {file: [] for file in due}
        unreached = False

        def after(index: int, energy: Energy, data: Tensor | None) -> None:
            nonlocal unreached
            unreached = unreached or (self._inverts and any(map(energy.idle, energy)))
            if unreached:
                return
            known = self._pruning.sources(energy)
            selection.measured(known)
            for source in known:
                sources[source.piece.file].append(source)
            for file in sorted(due):
                tensors = held.get((file, index), {})
                if f"file {file.name}" not in work.done and (tensors or due[file] == index):
                    target = None if self._pruning.edit_only else work.folder / file.name
                    shard = shards.get(file) or shards.setdefault(file, Shard(file, target, changes))
                    if data is not None:
                        shard.take({name: data[where] for name, where in tensors.items()})
                if due[file] == index:
                    _finish(work, file, shards.pop(file, None), digest_sources(sources[file]), beside)

        energy = self._offloaded.measure(self._batches, self._scratch, after=after)
        refuse_unmeasured(energy)
        if unreached:
            raise _UnreachedError(energy)
        self.idle = [label for layer in self._pruning.layers for label in energy.idle(layer.name).values()]

    def _places(self, changes: Changes) -> tuple[dict[tuple[Path, int], dict[str, slice]], dict[Path, int]]:
        """(file, block) -> the file's tensors that the block holds, and where in its memory; file -> after which block it is finished."""
        homes: dict[tuple[Path, int], tuple[int, int]] = {}
        for index, parts in enumerate(self._offloaded.parts):
            for part in parts:
                holder, key = part.places[0]
                for piece in part.pieces:
                    # a buffer may be changed by a forward pass, and what was converted is not what the file has
                    if isinstance(holder[key], nn.Parameter) and piece.dtype == part.dtype and piece.start < piece.stop:
                        first = part.start + piece.first * piece.columns * piece.dtype.itemsize
                        homes.setdefault((piece.file, piece.start), (index, first))
        measured = {layer.tensor: index for index, home in enumerate(self._offloaded.homes) for layer in home}
        held: dict[tuple[Path, int], dict[str, slice]] = {}
        due: dict[Path, int] = {}
        for name, place in self._pruning.stored.items():
            needed = [measured.get(piece.parameter, len(self._offloaded.homes)) for piece in changes.of(name)]
            if place.start < place.stop and (place.file, place.start) in homes:
                index, first = homes[place.file, place.start]
                held.setdefault((place.file, index), {})[name] = slice(first, first + place.stop - place.start)
                needed.append(index)
            due[place.file] = max(0, due.get(place.file, 0), *needed)
        return held, due


def _finish(
    work: Resumable, file: Path, shard: Shard | None, energies: str, beside: Callable[[], Sequence[Path]]
) -> None:
    """Record that a file is complete; one of an earlier run is forgotten if it was made with other energies."""
    name, known = f"file {file.name}", f"energies {file.name}"
    if shard is not None:
        facts = shard.finish()
        work.finish(known, energies)
        work.finish(name, facts, [*shard.written, *beside()])
    elif work.done.get(known) != energies:
        del work.done[name]


def _digest(batches: Sequence[Batch]) -> str:
    """Of the batches, to tell whether a call is the one that was killed."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                digest.update(f"{key} {tuple(value.shape)} {value.dtype};".encode())
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{key} {value!r};".encode())
    return digest.hexdigest()
