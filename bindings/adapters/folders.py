"""Which adapters there are, and the folder that takes all their results."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from hftcore.bindings.adapters.recipes import JOURNAL
from hftcore.bindings.models_io import ADAPTER
from hftcore.bindings.output import check_output
from hftcore.errors import HftcoreError

REPORT = "report.jsonl"


def find_adapters(places: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of each adapter, sorted by name.

    Args:
        places: each an adapter's folder, a folder of adapters' folders (each folder in it counts, hidden ones apart), or a pattern
            such as "runs/*/adapter-?" for such folders (files are passed over).

    Raises:
        HftcoreError: a place without a folder, or two of one name.
    """
    found: dict[str, Path] = {}
    for place in places:
        folders = [place] if os.path.exists(place) else sorted(filter(os.path.isdir, glob(place, recursive=True)))
        if not folders:
            raise HftcoreError(f"--adapters must be folders, or a pattern that some folders match, got {place}")
        for path in [inner for folder in folders for inner in _opened(Path(os.path.abspath(folder)))]:
            if path.name.startswith(".") or path.name in ("", REPORT):
                raise HftcoreError(f"--adapters must have names that results can be given, got {path}; rename it")
            other = found.setdefault(path.name, path)
            if not other.samefile(path):
                raise HftcoreError(
                    f"--adapters must differ in name, as their results do: {other} and {path}; rename one"
                )
    return dict(sorted(found.items()))


def _opened(folder: Path) -> list[Path]:
    """The folder itself if it is an adapter's (a damaged one too), else the folders in it."""
    if not folder.is_dir():
        raise HftcoreError(f"--adapters must be folders, got the file {folder}")
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return inside if inside and not (folder / ADAPTER).is_file() else [folder]


def check_results(out: Path, sources: Sequence[Path], resume: bool) -> Path:
    """The absolute path of the folder for the results: a new one or, to resume, that of an earlier run.

    Raises:
        HftcoreError: `out` is taken, or lies in a source.
    """
    if not (out / JOURNAL).is_dir():
        return check_output(out, sources, "--out")
    if not resume:
        raise HftcoreError(f"--out {out} holds results of an earlier run; add --resume, or choose another name")
    return check_output(out / JOURNAL / "new", sources, "--out").parent.parent


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Keep other processes out of `out`, and at the end remove what is half-made, and `out` itself where nothing was made.

    Raises:
        HftcoreError: another process is writing there.
    """
    (out / JOURNAL).mkdir(parents=True, exist_ok=True)
    with (out / JOURNAL / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HftcoreError(f"--out {out} is being written by another process; wait for it") from None
        try:
            _sweep(out)
            yield
        finally:
            _sweep(out)
            report = out / REPORT
            if {path.name for path in out.iterdir()} <= {JOURNAL, REPORT} and not (
                report.exists() and report.stat().st_size
            ):
                shutil.rmtree(out)


def _sweep(out: Path) -> None:
    """Remove what killed workers left half-made."""
    for path in out.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
