"""One exact threshold for pieces of a model's files that are more than memory holds, in as few readings as will do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hftcore import checks
from hftcore.bindings.checkpoints.blocks import Blocks, Rows, rows_of
from hftcore.bindings.checkpoints.keys import HELD, Keys
from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels.reference import FINITE
from hftcore.parts import Part
from hftcore.selection import confine

COLLECTED = 32  # one weight in so many, at most, lies in a window whose keys are collected
STRETCHES = 4096  # of the files make up a sample, at most
APART = 1 << 20  # bytes between their starts, unless there would be fewer than
FEWEST = 256
LENGTH = 4096  # bytes of each, or one row
DRAWN = 1024  # weights of each


@dataclass(frozen=True)
class Source:
    """A piece, the energy [columns] of its inputs, and the piece of the reference that stands for it."""

    piece: Piece
    energy: Tensor
    reference: Piece | None = None

    def part(self) -> Part:
        """The whole piece, mapped."""
        weight = self.piece.weight()
        return Part(weight, checks.norm(self.energy, weight), self.other(slice(None)))

    def other(self, rows: slice) -> Tensor | None:
        """Those rows of the reference, mapped."""
        return None if self.reference is None else self.reference.weight()[rows]


@dataclass(frozen=True)
class Shares:
    """Where the low set of several sources ends, and of each of them how many keys are below `key`, and how many equal it."""

    key: int
    below: list[int]
    ties: list[int]


def find_shares(sources: Sequence[Source], count: int, folder: Path) -> Shares:
    """The key that ends the `count` lowest weights of all sources.

    A sample of stretches all over the files proposes a window of keys. One reading collects the keys in it, those that are too many for
    memory in a file in `folder` (4 bytes each), which tells all there is to know. Where that would be one weight in `COLLECTED` or more,
    or the sample misled, a reading that counts by bins narrows the window first. So a bad sample costs a reading, never exactness.

    Raises:
        NonFiniteError: a score is NaN or infinite; it does not say which.
        HftcoreError: the folder has no room for keys.
    """
    total = sum(source.piece.rows * source.piece.columns for source in sources)
    most = max(HELD, total // COLLECTED)
    if not 0 < count < total:
        # no key is below 0, every finite one is below FINITE
        end = 0 if count == 0 else FINITE
        window, expected = (end, end), 0
    else:
        window, expected = _propose(sources, count / total, total)
    found = _collect(sources, count, window, folder, 2 * most) if expected <= most else None
    if found is None:
        bracket = confine(_Parts(sources), count, total, window, HELD)
        found = _collect(sources, count, (bracket.low, bracket.high), folder, HELD)
    if found is None:
        raise HftcoreError(
            f"the files of the model changed while they were read ({sources[0].piece.file}, ...); run again"
        )
    return found


def _propose(sources: Sequence[Source], share: float, total: int) -> tuple[tuple[int, int], int]:
    """A window of keys that very likely holds the wanted one, and how many weights it is expected to hold.

    Neighbours resemble each other, so the stretches, not the weights, tell how far off the sample may be: by four standard deviations.
    """
    keys = [
        part.call("sampled_keys", 0, max(1, part.weight.numel() // DRAWN) | 1).cpu().numpy()
        for _, part in _read(sources, _stretches(sources))
    ]
    sizes = np.array([len(one) for one in keys])
    drawn = np.concatenate(keys)
    place = min(len(drawn) - 1, int(share * len(drawn)))
    middle = np.partition(drawn, place)[place]
    below = np.add.reduceat(drawn < middle, np.cumsum(sizes) - sizes, dtype=np.int64)
    deviation = sqrt(float(np.square(below - share * sizes).sum()))
    first, last = max(0, int(place - 4 * deviation - 1)), min(len(drawn) - 1, ceil(place + 4 * deviation + 1))
    drawn.partition((first, last))
    low, high = int(drawn[first]), int(drawn[last]) + 1
    low, high = min(low, FINITE - 1), max(1, min(high, FINITE))
    # counted, for many weights may equal one of its ends
    expected = np.count_nonzero((drawn >= low) & (drawn < high)) / len(drawn) * total
    return (low, high), ceil(expected)


def _collect(sources: Sequence[Source], count: int, window: tuple[int, int], folder: Path, most: int) -> Shares | None:
    """The shares from the keys in a window as one reading collects them; None where it lacks the wanted one or has more than `most`."""
    low, high = window
    is_collected = high - low > 1  # of one key nothing but its count is wanted
    below, inside, ties = [0] * len(sources), [0] * len(sources), [0] * len(sources)
    spoiled = total = 0
    with Keys(folder) as keys:
        for number, part in _read(sources, _blocks(sources)):
            room = keys.room(part.weight.numel()) if is_collected else torch.empty(0, dtype=torch.int32)
            under, strange, _, counts = part.call("keys_between", low, min(high, FINITE), room)
            found = int(counts.sum())
            below[number] += under
            inside[number] += found
            total += found
            spoiled += strange
            if is_collected:
                if found > len(room) or total > most:
                    return None
                keys.took(found)
        if spoiled:
            raise NonFiniteError(f"{spoiled} scores are NaN or infinite")
        need = count - sum(below)
        if high == low:
            return Shares(low, below, ties)
        if not 0 < need <= total:
            return None
        if not is_collected:
            return Shares(low, below, inside)
        key = keys.nth(window, need)
        under_key, ties = keys.counts(key, inside)
        return Shares(key, [one + more for one, more in zip(below, under_key, strict=True)], ties)


class _Parts(Iterable[Callable[[], Part]]):
    """The blocks of all sources, read anew for every pass."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def __iter__(self) -> Iterator[Callable[[], Part]]:
        for _, part in _read(self._sources, _blocks(self._sources)):
            yield lambda part=part: part  # type: ignore[misc]


def _blocks(sources: Sequence[Source]) -> list[tuple[int, Rows]]:
    """All blocks of all sources, each with the number of its source."""
    return [(number, rows) for number, source in enumerate(sources) for rows in rows_of(source.piece)]


def _stretches(sources: Sequence[Source]) -> list[tuple[int, Rows]]:
    """Some rows here and there, at equal distances in bytes, each with the number of its source."""
    size = sum(source.piece.stop - source.piece.start for source in sources)
    step = max(LENGTH, min(APART, size // FEWEST), size // STRETCHES)
    found, offset = [], 0
    for number, source in enumerate(sources):
        piece = source.piece
        width = (piece.rows if piece.transposed else piece.columns) * piece.dtype.itemsize
        length = piece.stop - piece.start
        for place in range(-offset % step, length, step):
            count = min(length // width, max(1, LENGTH // width))
            found.append((number, Rows(piece, min(place // width, length // width - count), count)))
        offset += length
    return found


def _read(sources: Sequence[Source], stretches: Sequence[tuple[int, Rows]]) -> Iterator[tuple[int, Part]]:
    """(number of its source, the part) for each stretch; a part may be used until the next one is asked for."""
    raws = Blocks(2).read(rows.span for _, rows in stretches)
    others: Iterable[Tensor | None] = [None] * len(stretches)
    if sources[0].reference is not None:
        others = Blocks(2).read(_of_reference(sources[number], rows).span for number, rows in stretches)
    for (number, rows), raw, other in zip(stretches, raws, others, strict=True):
        weight = rows.of(raw)
        energy = sources[number].energy[rows.columns]
        part = Part(weight, checks.norm(energy, weight), None if other is None else rows.of(other))
        yield number, part


def _of_reference(source: Source, rows: Rows) -> Rows:
    if source.reference is None:
        raise HftcoreError(f"the reference of {source.piece.parameter} is missing")
    return replace(rows, piece=source.reference)
