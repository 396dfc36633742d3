"""One file of a checkpoint, read and changed a block of rows at a time, and written while the next one is read."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from hftcore.bindings.checkpoints.blocks import Blocks, Rows, Span, rows_of, spans_of
from hftcore.bindings.checkpoints.manifest import in_order
from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.bindings.checkpoints.stored import read_header
from hftcore.direct import DirectWriter
from hftcore.ops.fingerprints import fingerprint_sum

BLOCKS = 8  # in memory: one each is read, changed, hashed and written, and the others wait for the slowest of these

# the name of a tensor, what is changed of it here if anything, and where it lies
Step = tuple[str, Rows | None, Span]
# change(piece, row, block): change in place the rows of a piece from number `row` on, [rows, columns] in [out, in] orientation
Change = Callable[[Piece, int, Tensor], None]
# complete(parameter, before, after): all pieces of a parameter are done; the sums of its fingerprints
Complete = Callable[[str, int, int], None]


class Changes:
    """What happens to which pieces, and how far each parameter has come."""

    def __init__(self, pieces: Sequence[Piece], change: Change, complete: Complete, row_step: int = 1) -> None:
        self.change, self.row_step = change, row_step
        self._complete = complete
        self._of: dict[str, list[Piece]] = {}
        self._left: dict[str, int] = {}
        self._sums: dict[str, tuple[int, int]] = {}
        for piece in pieces:
            self._of.setdefault(piece.stored, []).append(piece)
            self._left[piece.parameter] = self._left.get(piece.parameter, 0) + 1

    def of(self, stored: str) -> list[Piece]:
        """The pieces of a stored tensor, in the order of their bytes; none if it is left as it is."""
        return sorted(self._of.get(stored, ()), key=lambda piece: piece.start)

    def resume(self, sums: Mapping[str, Sequence[int]]) -> None:
        """A file was done by an earlier run, with these sums."""
        for parameter, done in sums.items():
            self.done(parameter, *done)

    def done(self, parameter: str, pieces: int, before: int, after: int) -> None:
        """So many more pieces of a parameter are done, with these sums."""
        old = self._sums.get(parameter, (0, 0))
        self._sums[parameter] = (old[0] + before) % 2**64, (old[1] + after) % 2**64
        self._left[parameter] -= pieces
        if not self._left[parameter]:
            self._complete(parameter, *self._sums[parameter])


class Shard:
    """A file on its way through `changes`, its tensors in any order.

    Args:
        source: the file.
        target: where its changed copy is made; None to write none, and read only what is changed.
        changes: what to change.
    """

    def __init__(self, source: Path, target: Path | None, changes: Changes) -> None:
        self._source, self._target, self._changes = source, target, changes
        self._left: dict[str, list[Step]] = {}
        for step in _steps(source, changes, target is None):
            self._left.setdefault(step[0], []).append(step)
        self._names = [*self._left]
        self._digests: dict[str, Any] = {}
        self._sums: dict[str, list[int]] = {}
        if target is not None:
            target.write_bytes(b"")

    @property
    def written(self) -> list[Path]:
        """The file that is made, if any."""
        return [] if self._target is None else [self._target]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Change and write tensors, name -> their bytes as the file has them, which are changed in place and needed until this returns."""
        steps, blocks = [], []
        for name, data in tensors.items():
            mine = self._left.pop(name, [])
            first = mine[0][2][1] if mine else 0
            steps += mine
            blocks += [data[start - first : stop - first] for _, _, (_, start, stop) in mine]
        self._store(steps, blocks, lambda *_: None)

    def finish(self) -> dict[str, Any]:
        """Read, change and write what was not taken; what the manifest says of the file, and `sums` for each parameter; or those alone."""
        steps = [step for of in self._left.values() for step in of]
        self._left = {}
        memory = Blocks(2 if self._target is None else BLOCKS)
        self._store(steps, memory.read(span for _, _, span in steps), memory.jobs)
        if self._target is None:
            return self._sums
        found = {name: self._digests[name].hexdigest() for name in self._names}
        return {
            "bytes": self._target.stat().st_size,
            "header": found.pop(""),
            "tensors": found,
            "sums": self._sums,
        }

    def _store(self, steps: Sequence[Step], blocks: Iterable[Tensor], note: Callable[..., None]) -> None:
        """Change, hash and write the blocks of some steps; `note` is told what the block given last is needed for."""
        if self._target is None:
            for (_, rows, _), data in zip(steps, blocks, strict=True):
                if rows is not None:
                    _change(rows, data, self._changes, self._sums)
            return
        waiting: list[Future[None]] = []
        with DirectWriter(self._target) as out, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
            for (name, rows, (_, start, _)), data in zip(steps, blocks, strict=True):
                if rows is not None:
                    _change(rows, data, self._changes, self._sums)
                digest = self._digests.setdefault(name, hashlib.sha256())
                jobs = hasher.submit(digest.update, data.numpy()), writer.submit(out.write, start, data)
                note(*jobs)
                waiting += jobs
            for job in waiting:
                job.result()
            out.flush()


def _steps(file: Path, changes: Changes, changed_only: bool) -> list[Step]:
    """What a file consists of from its start to its end, "" being the name of its header."""
    steps: list[Step] = []
    tensors = in_order(read_header(file))
    if not changed_only:
        steps += (("", None, span) for span in spans_of(file, 0, tensors[0][1].start))
    for name, place in tensors:
        pieces = changes.of(name)
        if not pieces and not changed_only:
            steps += ((name, None, span) for span in spans_of(file, place.start, place.stop))
        steps += ((name, rows, rows.span) for piece in pieces for rows in rows_of(piece, changes.row_step))
    return steps


def _change(rows: Rows, data: Tensor, changes: Changes, sums: dict[str, list[int]]) -> None:
    """Change a block in its memory, and count it in `sums`."""
    piece, stored = rows.piece, data.view(rows.piece.dtype)
    # a transposed piece comes whole
    row = 0 if piece.transposed else rows.first
    first = (piece.first + row) * piece.columns
    before = fingerprint_sum(stored, first)
    changes.change(piece, row, rows.of(data))
    after = fingerprint_sum(stored, first)
    done = sums.setdefault(piece.parameter, [0, 0, 0])
    is_last = piece.transposed or rows.first + rows.count == piece.rows
    done[:] = done[0] + is_last, (done[1] + before) % 2**64, (done[2] + after) % 2**64
    changes.done(piece.parameter, int(is_last), before, after)
