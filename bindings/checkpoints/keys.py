"""Keys that are more than memory should hold, in the order in which they were found."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from hftcore.errors import HftcoreError
from hftcore.searches import bins_of, narrowed

HELD = 1 << 23  # keys in memory at most
LOOKED_AT = 1 << 20  # keys looked at together
ROUND_BITS = 16  # of a key that one look at all of them tells


class Keys:
    """Keys one after the other. Those that `HELD` has no room for are in a file, which has no name and is gone with the process.

    Args:
        folder: where the file is made, if one is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = torch.empty(HELD, dtype=torch.int32)
        self._filled = self._stored = 0
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

    def nth(self, window: tuple[int, int], need: int) -> int:
        """The key at which their count from the lowest on reaches `need`.

        Args:
            window: none of them lies outside; from the one to below the other.
            need: 1 to how many they are.

        Raises:
            HftcoreError: some cannot be read back.
        """
        low, high = window
        while high - low > 1:
            shift = max(0, (high - low - 1).bit_length() - ROUND_BITS)
            bins = ((high - low - 1) >> shift) + 1
            counts = torch.zeros(bins, dtype=torch.int64)
            for some in self._parts(0, self._stored + self._filled):
                some = some[(some >= low) & (some < high)]
                counts += bins_of((some - low) >> shift, None, bins)
            (low, high), need, _ = narrowed(counts, (low, high), shift, need)
        return low

    def counts(self, key: int, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Of the first `sizes[0]` keys, of the next `sizes[1]`, ...: how many are below `key`, and how many equal it."""
        below, equal, start = [0] * len(sizes), [0] * len(sizes), 0
        for number, size in enumerate(sizes):
            for some in self._parts(start, start + size):
                below[number] += int(np.count_nonzero(some < key))
                equal[number] += int(np.count_nonzero(some == key))
            start += size
        return below, equal

    def _parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Keys number `start` to `stop`, some at a time."""
        while start < stop:
            end = min(stop, start + LOOKED_AT)
            if self._file is not None and start < self._stored:
                end = min(end, self._stored)
                self._file.seek(4 * start)
                some = np.fromfile(self._file, np.int32, end - start)
                if len(some) < end - start:
                    raise HftcoreError(
                        f"cannot read back the keys that were kept in {self._folder}; check the disk, then run again"
                    )
                yield some
            else:
                yield self._held[start - self._stored : end - self._stored].numpy()
            start = end

    def _store(self) -> None:
        if not self._filled:
            return
        try:
            if self._file is None:
                # unbuffered: what fails should fail here, and not again when it is closed
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 (until `__exit__`)
                    buffering=0, dir=self._folder, prefix=".hftcore-keys-"
                )
            data = self._held[: self._filled].numpy().data.cast("B")
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise HftcoreError(
                f"cannot keep the keys next to the threshold in {self._folder}: {error}; a model may need an eighth of its size there"
            ) from error
        self._stored += self._filled
        self._filled = 0
