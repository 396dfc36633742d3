"""Where results may go: never over something, never into what is read."""

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hftcore.errors import HftcoreError


def check_output(out: str | Path, sources: Sequence[str | Path] = (), name: str = "OUT", is_file: bool = False) -> Path:
    """The absolute path of `out`, once it is known to be free and outside every source.

    Args:
        out: a folder or file to be made; a folder may be there already, if it is empty.
        sources: folders that are read and must not be written into; those that do not exist (hub ids) are skipped.
        name: what the message calls `out`.
        is_file: whether a file is to be made.

    Raises:
        HftcoreError: `out` exists and is not an empty folder (or at all, for a file), or one that cannot be replaced, as a mount point; it
            lies in a source, or in something that is no folder to write in.

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
        if is_file:
            found = "a folder" if is_folder else "it exists"
            raise HftcoreError(
                f"{name} must be a file that does not exist yet, got {out} ({found}); choose another name"
            )
        if not is_folder or any(path.iterdir()):
            found = "not empty" if is_folder else "it exists"
            raise HftcoreError(
                f"{name} must not exist yet or be an empty folder, got {out} ({found}); choose another name"
            )
        if is_folder:
            _check_replaceable(path, out, name)
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise HftcoreError(
            f"{name} must lie in a folder that can be written, got {out} in {above}; choose another place"
        )
    return path


def _check_replaceable(folder: Path, out: str | Path, name: str) -> None:
    """Refuse an empty folder that could not give way to the result, which comes by a rename, when all the work is done."""
    try:
        with tempfile.TemporaryDirectory(prefix=".hftcore-", dir=folder):
            # the system says why it would not remove this folder, or only that it is not empty
            os.rmdir(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        reason = "a mount point, which cannot be replaced" if error.errno == errno.EBUSY else f"{error.strerror}"
        raise HftcoreError(
            f"{name} must not exist yet or be an empty folder that can be replaced, got {out} ({reason}); choose another name, inside it "
            "for example"
        ) from error
