"""The manifest of a checkpoint folder: a sha256 of every tensor and file, written last, so that a folder can be verified."""

import hashlib
import json
from io import FileIO
from pathlib import Path
from typing import Any

from hftcore.bindings.checkpoints.stored import StoredTensor, read_header
from hftcore.edit import CONFIG, TENSORS
from hftcore.errors import HftcoreError

MANIFEST = "hftcore_manifest.json"
EDIT = "edit"  # the Edit's folder inside the model's
FORMAT = 1
CHUNK = 1 << 20


def write_manifest(folder: Path, files: dict[str, Any], edit: str | None = None) -> Path:
    """Write what `describe` says of each file, relative path -> facts, and where the Edit lies that led to these weights.

    Returns the manifest's path.
    """
    path = folder / MANIFEST
    text = json.dumps({"format": FORMAT, "edit": edit, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        HftcoreError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (
            manifest["format"],
            manifest["edit"],
            {name: facts["bytes"] for name, facts in manifest["files"].items()},
        )
    except FileNotFoundError as error:
        raise HftcoreError(f"{folder} has no {MANIFEST}, so there is nothing to compare it with") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HftcoreError(f"{path} is damaged ({type(error).__name__}); write the folder again") from error
    if found[0] != FORMAT:
        raise HftcoreError(f"{path} has format {found[0]}, this version reads {FORMAT}")
    return manifest


def describe(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of a `.safetensors` file the sha256 of its header and of each tensor.

    Raises:
        HftcoreError: a `.safetensors` file that is cut off or damaged.
    """
    with file.open("rb", buffering=0) as content:
        if file.suffix != ".safetensors":
            return {"bytes": file.stat().st_size, "sha256": _digest(content, file.stat().st_size)}
        places = in_order(read_header(file))
        header = places[0][1].start if places else file.stat().st_size
        return {
            "bytes": file.stat().st_size,
            "header": _digest(content, header),
            "tensors": {name: _digest(content, place.stop - place.start) for name, place in places},
        }


def describe_edit(folder: Path) -> dict[str, Any]:
    """What `write_manifest` takes of the Edit in a model's folder.

    Its fingerprints vouch for the values, so of those only the size is told: to read them again would take as long as to write them.
    """
    place = folder / EDIT
    return {
        f"{EDIT}/{TENSORS}": {"bytes": (place / TENSORS).stat().st_size},
        f"{EDIT}/{CONFIG}": describe(place / CONFIG),
    }


def in_order(tensors: dict[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    """The tensors of one file in the order of their bytes."""
    return sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop, item[0]))


def _digest(content: FileIO, size: int) -> str:
    """Of the next `size` bytes of a file."""
    digest = hashlib.sha256()
    room = memoryview(bytearray(min(size, CHUNK)))
    while size:
        got = content.readinto(room[:size])
        if not got:
            raise HftcoreError(f"{content.name} ended {size} bytes early; was it changed while it was read?")
        digest.update(room[:got])
        size -= got
    return digest.hexdigest()
