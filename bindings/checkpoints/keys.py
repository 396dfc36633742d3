"""Keys that are more than memory should hold, in the order in which they were found."""

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from hftcore.errors import HftcoreError
from hftcore.searches import bins_of, narrowed

HELD = 1 << 23  # keys in memory at most
LOOKED_AT = 1 << 20  # keys of a file looked at together
ROUND_BITS = 16  # of a key that one look at all of them tells


class Keys:
    """Keys one after the other. Once they are more than `HELD`, those before are in a file, which has no name and is gone with the process.

    Args:
        folder: where the file is made, if one is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = torch.empty(HELD, dtype=torch.int32)
        self._filled = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Keys":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def room(self, wanted: int) -> Tensor:
        """[n] int32 to put the next keys into; n is at least the smaller one of `wanted` and `HELD`. Tell with `took` how many they are.

        Raises:
            HftcoreError: the folder has no room for those before.
        """
        if self._filled + wanted > len(self._held):
            self._store()
        return self._held[self._filled :]

    def took(self, count: int) -> None:
        """So many keys were put into what `room` gave."""
        self._filled += count

    def all(self) -> np.ndarray:
        """[n] int32, every key; read only where they are in the file. Nothing can be added any more.

        Raises:
            HftcoreError: the folder has no room for them.
        """
        if self._file is None:
            return self._held[: self._filled].numpy()
        self._store()
        return np.memmap(self._file, np.int32, "r")

    def _store(self) -> None:
        if not self._filled:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".hftcore-keys-")  # noqa: SIM115 (as long as this)
            self._file.write(self._held[: self._filled].numpy().data)
            self._file.flush()
        except OSError as error:
            raise HftcoreError(
                f"{self._folder} has no room for the keys next to the threshold ({error}); make room there"
            ) from error
        self._filled = 0


def nth_key(keys: np.ndarray, window: tuple[int, int], need: int) -> int:
    """The key at which the count of `keys` from the lowest on reaches `need`.

    Args:
        keys: [n] int32, none of them outside the window.
        window: from the one to below the other.
        need: 1 to n.
    """
    low, high = window
    while high - low > 1:
        shift = max(0, (high - low - 1).bit_length() - ROUND_BITS)
        bins = ((high - low - 1) >> shift) + 1
        counts = torch.zeros(bins, dtype=torch.int64)
        for start in range(0, len(keys), LOOKED_AT):
            some = keys[start : start + LOOKED_AT]
            some = some[(some >= low) & (some < high)]
            counts += bins_of((some - low) >> shift, None, bins)
        (low, high), need, _ = narrowed(counts, (low, high), shift, need)
    return low
