"""What decides the result for one adapter, and by it which results of an earlier run are the ones wanted now."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import hftcore
from hftcore.bindings.jobs import Job
from hftcore.edit import Edit
from hftcore.errors import HftcoreError
from hftcore.files import whole_file

JOURNAL = ".journal"

Recipe = dict[str, Any]
Line = dict[str, Any]


def shared_recipe(job: Job, dense_ratio: float, base: Path) -> Recipe:
    """The part of the recipe that all adapters share: choices, and digests of the base model and the data. Reads both whole."""
    data = None
    if job.data is not None:
        with job.data.open("rb") as content:
            data = hashlib.file_digest(content, "sha256").hexdigest()
    return {
        "method": "antidote",
        "version": hftcore.__version__,
        "base": digest_of(base),
        "data": data,
        "dense_ratio": dense_ratio,
        "targets": job.targets,
        "exclude": job.exclude,
        "tokens": job.tokens,
        "num_samples": job.num_samples,
        "max_length": job.max_length,
        "batch_size": job.batch_size,
        "score": job.score,
        "seed": job.seed,
        "dtype": job.dtype,
        "edit_only": job.edit_only,
    }


def digest_of(folder: Path, suffixes: Collection[str] | None = None, without: Collection[str] = ()) -> str:
    """SHA-256 over the names and contents of a folder's own files, hidden ones and its folders left out.

    Args:
        suffixes: only files with these; None for all.
        without: names of files to leave out.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        wanted = suffixes is None or path.suffix in suffixes
        if wanted and path.is_file() and not path.name.startswith(".") and path.name not in without:
            with path.open("rb") as content:
                inside = hashlib.file_digest(content, "sha256").hexdigest()
            whole.update(f"{len(path.name)} {path.name} {inside}\n".encode())
    return whole.hexdigest()


def note(out: Path, name: str, recipe: Recipe) -> None:
    """Write down by what recipe `out/name` is about to be made; it appears whole, so if it is there this recipe made it."""
    with whole_file(out / JOURNAL / f"{name}.json") as draft:
        draft.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def is_finished(out: Path, name: str, recipe: Recipe) -> bool:
    """Whether `out/name` was made by this very recipe.

    Raises:
        HftcoreError: it was made by another one, or nothing tells by which.
    """
    if not (out / name).exists():
        return False
    try:
        made_by = json.loads((out / JOURNAL / f"{name}.json").read_text(encoding="utf-8"))
        differing = sorted(key for key in recipe.keys() | made_by.keys() if recipe.get(key) != made_by.get(key))
    except (OSError, ValueError, AttributeError):
        differing = ["all that is known of it"]
    if differing:
        raise HftcoreError(
            f"{out / name} is there already and was made otherwise ({', '.join(differing)} differ); remove it or choose another --out"
        )
    return True


def line_of(out: Path, name: str, edit_only: bool) -> Line:
    """The report's line on a finished adapter whose own line was lost."""
    edit = Edit.load(out / name if edit_only else out / name / "edit")
    return repaired(name, edit.sparsity, edit.removed, edit.size)


def repaired(name: str, sparsity: float, removed: int, size: int, seconds: float | None = None) -> Line:
    """The line on an adapter that was repaired."""
    return {
        "name": name,
        "status": "repaired",
        "seconds": seconds,
        "sparsity": sparsity,
        "removed": removed,
        "size": size,
    }


def failed(name: str, error: BaseException | str, seconds: float | None = None) -> Line:
    """The line on an adapter that was not."""
    message = " ".join(str(error).split())
    known = isinstance(error, (str, ValueError, OSError)) and message
    said = message if known else f"{type(error).__name__}: {message}"
    return {"name": name, "status": "failed", "seconds": seconds, "error": said}
