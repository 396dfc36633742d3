"""Results by recipe, in one JSON file that is whole after every cell: what an interrupted run has finished is not done again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftcore.errors import HftcoreError
from hftcore.files import whole_file

FORMAT = 1


def key_of(recipe: dict[str, Any]) -> str:
    """The name of a recipe: 16 hexadecimal digits of the SHA-256 of its JSON, whatever the order of its keys.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Cells:
    """A file of `{"format", "about", "cells": {key: {"recipe", "result"}}}`, replaced as a whole after each new cell.

    Args:
        path: made with the first cell; an existing one is continued.
        about: facts for the reader of the file, kept beside the cells; they replace those of an existing file.

    Raises:
        HftcoreError: `path` is a folder, or a file that is not one of these.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cells = Cells(Path(folder, "results.json"))
    ...     cells.once({"x": 2}, lambda: 4), cells.once({"x": 2}, lambda: 5)
    (4, 4)
    """

    def __init__(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.cells: dict[str, dict[str, Any]] = {}
        old: dict[str, Any] = {}
        if self.path.exists():
            old = self._read()
            self.cells = old["cells"]
        self.about = about if about is not None else old.get("about", {})

    def once(self, recipe: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The result of `recipe`: the stored one, or that of `make()`, which is stored. Recipes and results are JSON values."""
        key = key_of(recipe)
        if key not in self.cells:
            self.cells[key] = {"recipe": recipe, "result": make()}
            self.write()
        return self.cells[key]["result"]

    def __contains__(self, recipe: dict[str, Any]) -> bool:
        return key_of(recipe) in self.cells

    def write(self) -> None:
        """Replace the file by what is held now."""
        with whole_file(self.path) as draft:
            draft.write_text(
                json.dumps({"format": FORMAT, "about": self.about, "cells": self.cells}, indent=1) + "\n",
                encoding="utf-8",
            )

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["format"] == FORMAT and isinstance(stored["cells"], dict):
                return stored
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HftcoreError(
                f"{self.path} is no file of results to continue ({type(error).__name__}); choose another name"
            ) from error
        raise HftcoreError(
            f"{self.path} has format {stored['format']}, this version writes {FORMAT}; choose another name"
        )
