"""A folder made in steps: whole or absent like `files.whole_folder`, and a killed run is continued by the next one."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hftcore.errors import HftcoreError
from hftcore.files import sync


class Resumable:
    """A folder in the making: `folder` is what will become the result, `done` the finished steps and their facts."""

    def __init__(self, folder: Path, journal: IO[bytes], done: dict[str, Any]) -> None:
        self.folder, self.done = folder, done
        self._journal = journal

    def finish(self, step: str, facts: Any, files: Iterable[Path] = ()) -> None:
        """Record a step with its facts (JSON values), once its files are on the disk."""
        written = list(files)
        for place in [*written, *{file.parent for file in written}]:
            sync(place)
        _write(self._journal, [step, facts])
        self.done[step] = facts


@contextmanager
def resumable_folder(out: str | os.PathLike[str], job: str) -> Iterator[Resumable]:
    """Make the folder `out` in steps, such that a killed run is continued by the next one with the same `job`.

    Two siblings of `out` hold what is not complete yet: the folder `.NAME.partial`, which becomes `out` by a rename when the
    block ends without an exception, and `.NAME.journal`, with a line for each finished step. They stay after a kill, and once a
    step is finished after Ctrl-C or an OSError such as a full disk too; a HftcoreError, which the same call would meet again,
    removes them.

    Args:
        out: the folder to make; it must not exist, or be empty.
        job: text that is the same only for the same inputs and choices. What another job left unfinished is removed, with a warning.

    Raises:
        HftcoreError: `out` is taken, or another process is making it.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial")
    path = target.with_name(f".{target.name}.journal")
    with path.open("ab+") as journal:
        _lock(journal, path, target)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            path.unlink()
            raise HftcoreError(f"{target} exists already; remove it or choose another place")
        done: dict[str, Any] = {}
        try:
            _resume(journal, work, job, done)
            yield Resumable(work, journal, done)
        except BaseException as error:
            if not done or isinstance(error, HftcoreError):
                # without its journal the folder means nothing, so the order is right if this is killed too
                path.unlink()
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, OSError):
                kept = f"what is finished is kept in {work}: the same call continues it"
                raise OSError(error.errno, f"{error.strerror or error}; {kept}") from error
            raise
        for folder in (work, *(item for item in work.rglob("*") if item.is_dir())):
            sync(folder)
        os.replace(work, target)
        sync(target.parent)
        path.unlink()


def _lock(journal: IO[bytes], path: Path, target: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the process that had it may have finished and removed it since it was opened here
        locked = os.path.samestat(os.fstat(journal.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        locked = False
    if not locked:
        raise HftcoreError(f"{target} is being written by another process; wait for it or choose another place")


def _resume(journal: IO[bytes], work: Path, job: str, done: dict[str, Any]) -> None:
    """Fill `done` with the steps that an interrupted run of the same job finished; what another job left is removed."""
    steps, end = _read(journal)
    if steps and steps[0] == ["job", job] and work.is_dir():
        journal.truncate(end)
        done.update(steps[1:])
        return
    if steps and work.exists():
        warnings.warn(f"{work} holds an unfinished result of other inputs or choices; it is made anew", stacklevel=5)
    # the journal first: a folder that it does not know is removed
    journal.truncate(0)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    sync(work.parent)
    _write(journal, ["job", job])


def _read(journal: IO[bytes]) -> tuple[list[Any], int]:
    """The whole lines, and where they end: a kill may have cut off the last one, a power cut may have left noise."""
    journal.seek(0)
    steps, end = [], 0
    for line in journal:
        try:
            name, facts = json.loads(line if line.endswith(b"\n") else b"")
        except (ValueError, TypeError):
            break
        steps.append([name, facts])
        end += len(line)
    return steps, end


def _write(journal: IO[bytes], line: Any) -> None:
    journal.write(json.dumps(line).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())
