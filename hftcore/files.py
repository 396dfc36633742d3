"""Writing to disk so that what is there is whole or absent."""

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hftcore.errors import HftcoreError


@contextmanager
def whole_folder(out: str | os.PathLike[str], replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends without an exception.

    Args:
        out: the folder to make. It must not exist, be an empty folder, or hold nothing but files named in `replaces`.
        replaces: names of the files of an earlier result, which this call may replace.

    Raises:
        HftcoreError: `out` exists and may not be replaced. Any exception of the block, with `out` as it was.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and {item.name for item in target.iterdir()} <= set(replaces)):
        raise HftcoreError(f"{target} exists already; remove it or choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    work = target.with_name(f".{target.name}.{mark}.partial")
    old = target.with_name(f".{target.name}.{mark}.replaced")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                sync(file)
        sync(work)
        # an empty folder gives way by itself, and one that a container's image holds cannot be moved
        if target.exists() and any(target.iterdir()):
            os.replace(target, old)
        os.replace(work, target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that replaces `out` when the block ends without an exception."""
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield work
        sync(work)
        os.replace(work, target)
        sync(target.parent)
    finally:
        work.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
