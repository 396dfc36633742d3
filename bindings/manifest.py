"""The manifest of a checkpoint folder: a sha256 of every tensor and file, written last, so that a folder can be verified."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hftcore.bindings.progress import Track
from hftcore.bindings.stored import StoredTensor, read_header
from hftcore.errors import HftcoreError

MANIFEST = "hftcore_manifest.json"
FORMAT = 1
CHUNK = 1 << 24


def write_manifest(folder: Path, files: dict[str, Any]) -> Path:
    """Write what `describe` says of each file, relative path -> facts; returns the manifest's path."""
    path = folder / MANIFEST
    text = json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def describe(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of a `.safetensors` file the sha256 of its header and of each tensor.

    Raises:
        HftcoreError: a `.safetensors` file that is cut off or damaged.
    """
    with file.open("rb") as content:
        if file.suffix != ".safetensors":
            return {"bytes": file.stat().st_size, "sha256": _digest(content, file.stat().st_size)}
        places = in_order(read_header(file))
        header = places[0][1].start if places else file.stat().st_size
        return {
            "bytes": file.stat().st_size,
            "header": _digest(content, header),
            "tensors": {name: _digest(content, place.stop - place.start) for name, place in places},
        }


def in_order(tensors: dict[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    """The tensors of one file in the order of their bytes."""
    return sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop, item[0]))


def chunks(content: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, a chunk at a time."""
    while size:
        data = content.read(min(size, CHUNK))
        if not data:
            raise HftcoreError(f"{content.name} ended {size} bytes early; was it changed while it was read?")
        size -= len(data)
        yield data


def _digest(content: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    for data in chunks(content, size):
        digest.update(data)
    return digest.hexdigest()


def verify_folder(folder: str | Path) -> dict[str, Any]:
    """Read every byte of a folder and compare it with its manifest.

    Returns:
        {"files": how many, "tensors": how many, "bytes": how many, "problems": [one line each]}; no problems means that the folder
        is whole and as it was written. Files the manifest does not know are left alone.

    Raises:
        HftcoreError: no such folder, an unfinished one, or no readable manifest.
    """
    target = Path(os.path.abspath(folder))
    journal = target.with_name(f".{target.name}.journal")
    if not target.is_dir():
        unfinished = f": it is unfinished ({journal} is there); run the same command again" if journal.exists() else ""
        raise HftcoreError(f"{folder} is not a folder{unfinished}")
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        found, files = manifest["format"], dict(manifest["files"])
    except FileNotFoundError as error:
        raise HftcoreError(f"{folder} has no {MANIFEST}, so there is nothing to compare it with") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HftcoreError(
            f"{target / MANIFEST} is damaged ({type(error).__name__}); write the folder again"
        ) from error
    if found != FORMAT:
        raise HftcoreError(f"{target / MANIFEST} has format {found}, this version reads {FORMAT}")
    problems: list[str] = []
    for name, wanted in Track(files.items(), "verify"):
        problems += _problems(target / name, name, wanted)
    return {
        "files": len(files),
        "tensors": sum(len(facts.get("tensors", ())) for facts in files.values()),
        "bytes": sum(facts["bytes"] for facts in files.values()),
        "problems": problems,
    }


def _problems(file: Path, name: str, wanted: dict[str, Any]) -> list[str]:
    if not file.is_file():
        return [f"{name} is missing"]
    try:
        facts = describe(file)
    except HftcoreError as error:
        return [str(error)]
    changed = [f"{name}: {key} differs" for key in ("bytes", "sha256", "header") if facts.get(key) != wanted.get(key)]
    have, want = facts.get("tensors", {}), wanted.get("tensors", {})
    return changed + [f"{name}: tensor {key!r} differs" for key in sorted(want) if have.get(key) != want[key]]
