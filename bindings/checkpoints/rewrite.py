"""Copy a checkpoint folder file by file, changing pieces of its tensors on the way, a block of rows at a time."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hftcore import __version__
from hftcore.bindings.checkpoints.manifest import MANIFEST, describe
from hftcore.bindings.checkpoints.shard import Changes, Shard
from hftcore.bindings.checkpoints.stored import PICKLES, StoredTensor, check_link
from hftcore.bindings.progress import Track
from hftcore.edit import CONFIG
from hftcore.errors import HftcoreError
from hftcore.resumable import Resumable

WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack")


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
            facts = Shard(source / name, target, changes).finish() if name in shards else _copy(source / name, target)
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
            work.finish(f"file {file.name}", Shard(file, None, changes).finish(), beside())


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
