"""A folder that another Python can import hftcore from: the checkout's folders under their import names."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

FOLDERS = ("hftcore", "hftcore.kernels", "hftcore.bindings", "hftcore.bench")


def here() -> dict[str, Path]:
    """Import name -> folder, of the hftcore that runs now."""
    found = {}
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ImportError(f"{name} lies nowhere as files")
        found[name] = Path(spec.origin).resolve().parent
    return found


def of(checkout: Path) -> dict[str, Path]:
    """Import name -> folder, of a checkout."""
    return {name: checkout / name.removeprefix("hftcore.") for name in FOLDERS}


def link(target: Path, folders: Mapping[str, Path]) -> Path:
    """Fill the empty folder `target`, to be put on PYTHONPATH, with links; returns it."""
    package = target / "hftcore"
    package.mkdir()
    for entry in folders["hftcore"].iterdir():
        if entry.name not in ("kernels", "bindings", "bench", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    for name in FOLDERS[1:]:
        (package / name.removeprefix("hftcore.")).symlink_to(folders[name], target_is_directory=True)
    return target
