"""Copy a checkpoint folder file by file, changing pieces of its tensors on the way, a block of rows at a time."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from hftcore import __version__
from hftcore.bindings.checkpoints.blocks import Blocks, Rows, Span, rows_of, spans_of
from hftcore.bindings.checkpoints.manifest import MANIFEST, describe, in_order
from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.bindings.checkpoints.stored import PICKLES, StoredTensor, check_link, read_header
from hftcore.bindings.progress import Track
from hftcore.direct import DirectWriter
from hftcore.edit import CONFIG
from hftcore.errors import HftcoreError
from hftcore.ops.fingerprints import fingerprint_sum
from hftcore.resumable import Resumable

BLOCKS = 5  # in memory: one each is read, changed, hashed and written, and one waits for the slowest of these
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack")

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


def signature(folders: Sequence[Path], choices: Any) -> str:
    """Text that is another one when a file of the folders or one of the choices (JSON values) is."""
    files = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        for file in sorted(folder.resolve().rglob("*"))
        if file.is_file()
    ]
    facts = {"hftcore": __version__, "choices": choices, "files": files}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def rewrite_files(
    source: Path,
    stored: Mapping[str, StoredTensor],
    work: Resumable,
    changes: Changes,
    beside: Callable[[], Sequence[Path]] = tuple,
    keeps_edit: bool = True,
) -> dict[str, Any]:
    """Write the changed copy of every file of the folder `source` to `work.folder`, one journaled step a file.

    Args:
        source: the checkpoint folder.
        stored: its tensors.
        work: where finished files are skipped.
        changes: what to change.
        beside: finishes what `changes` writes elsewhere and names the files; they are on the disk before a step is recorded.
        keeps_edit: copy an Edit in `source/edit` too.

    Returns:
        Relative path -> what the manifest says of the file.

    Raises:
        HftcoreError: a file is damaged or changes under way; or what `changes` raises.
    """
    shards = {place.file.name for place in stored.values()}
    files = {}
    # the shards first: they are what may fail
    for name in Track(sorted(_files(source, shards, keeps_edit), key=lambda name: name not in shards), "write"):
        facts = work.done.get(f"file {name}")
        if facts is not None:
            changes.resume(facts.get("sums", {}))
        else:
            target = work.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            facts = _rewrite(source / name, target, changes) if name in shards else _copy(source / name, target)
            work.finish(f"file {name}", facts, [target, *beside()])
        files[name] = {key: value for key, value in facts.items() if key != "sums"}
    return files


def change_only(
    stored: Mapping[str, StoredTensor], work: Resumable, changes: Changes, beside: Callable[[], Sequence[Path]]
) -> None:
    """Pass the pieces through `changes`, one journaled step a file, and write nothing else; `beside` as for `rewrite_files`."""
    for file in Track(sorted({place.file for place in stored.values()}), "read"):
        sums = work.done.get(f"file {file.name}")
        if sums is not None:
            changes.resume(sums)
        else:
            sums = {}
            for _ in _stream(file, changes, sums, Blocks(2), changed_only=True):
                pass
            work.finish(f"file {file.name}", sums, beside())


def _rewrite(source: Path, target: Path, changes: Changes) -> dict[str, Any]:
    """Write the changed copy of one file; what the manifest says of it, and `sums` for each parameter."""
    digests: dict[str, Any] = {}
    sums: dict[str, list[int]] = {}
    memory, position = Blocks(BLOCKS), 0
    target.write_bytes(b"")
    with DirectWriter(target) as out, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        for name, data in _stream(source, changes, sums, memory):
            digest = digests.setdefault(name, hashlib.sha256())
            memory.jobs(hasher.submit(digest.update, data.numpy()), writer.submit(out.write, position, data))
            position += len(data)
        memory.settle()
        out.flush()
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    return {"bytes": position, "header": found.pop(""), "tensors": found, "sums": sums}


def _stream(
    file: Path, changes: Changes, sums: dict[str, list[int]], memory: Blocks, changed_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name of the tensor, its next bytes) from the start of a file to its end, "" for its header, with the changes made.

    Fills `sums`: parameter -> [pieces done, sum before, sum after].
    """
    plan: list[tuple[str, Rows | None, Span]] = []
    tensors = in_order(read_header(file))
    if not changed_only:
        plan += (("", None, span) for span in spans_of(file, 0, tensors[0][1].start))
    for name, place in tensors:
        pieces = changes.of(name)
        if not pieces and not changed_only:
            plan += ((name, None, span) for span in spans_of(file, place.start, place.stop))
        plan += ((name, rows, rows.span) for piece in pieces for rows in rows_of(piece, changes.row_step))
    for (name, rows, _), data in zip(plan, memory.read(span for _, _, span in plan), strict=True):
        if rows is not None:
            _change(rows, data, changes, sums)
        yield name, data


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


def _copy(source: Path, target: Path) -> dict[str, Any]:
    shutil.copyfile(source, target)
    return describe(target)


def _files(source: Path, shards: Collection[str], keeps_edit: bool) -> list[str]:
    """The files to carry over, relative to the folder; other copies of the weights would be ones nobody changed."""
    names, left = [], []
    for path in _walk(source, source):
        name = path.relative_to(source).as_posix()
        if not keeps_edit and name.startswith("edit/") and (source / "edit" / CONFIG).is_file():
            continue
        if name not in shards and path.suffix in WEIGHTS and not name.startswith("edit/"):
            left.append(name)
        elif name != MANIFEST:
            names.append(name)
    if left:
        warnings.warn(
            f"not copied, as they may hold the weights as they were: {', '.join(left[:5])}"
            + (f" and {len(left) - 5} more" if len(left) > 5 else ""),
            stacklevel=2,
        )
    return names


def _walk(folder: Path, top: Path) -> Iterator[Path]:
    for item in sorted(folder.iterdir()):
        if item.is_dir():
            if item.is_symlink():
                raise HftcoreError(f"{item} is a link to a folder; copy what it links to into its place")
            yield from _walk(item, top)
        else:
            check_link(item, top)
            if not item.is_file():
                raise HftcoreError(f"{item} is no file that can be copied (a pipe, socket or device); remove it")
            yield item
