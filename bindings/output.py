"""Where results may go: never over something, never into what is read."""

import os
from collections.abc import Sequence
from pathlib import Path

from hftcore.errors import HftcoreError


def check_output(out: str | Path, sources: Sequence[str | Path] = (), name: str = "OUT") -> Path:
    """The absolute path of `out`, once it is known to be free and outside every source.

    Args:
        out: a folder or file to be made; it may be an empty folder.
        sources: folders that are read and must not be written into; those that do not exist (hub ids) are skipped.
        name: what the message calls `out`.

    Raises:
        HftcoreError: `out` exists and is not an empty folder, or it lies in a source.

    >>> check_output("/", name="--out")
    Traceback (most recent call last):
    hftcore.errors.HftcoreError: --out must not exist yet or be an empty folder, got / (not empty); choose another name
    """
    path = Path(os.path.abspath(out))
    inner = Path(os.path.realpath(path))
    for source in sources:
        real = Path(os.path.realpath(source))
        if real.exists() and (inner == real or real in inner.parents):
            raise HftcoreError(f"{name} must lie outside {source}, which is only read, got {out}; choose another place")
    if os.path.lexists(path):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder or any(path.iterdir()):
            found = "not empty" if is_folder else "it exists"
            raise HftcoreError(
                f"{name} must not exist yet or be an empty folder, got {out} ({found}); choose another name"
            )
    return path
