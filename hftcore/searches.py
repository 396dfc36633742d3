"""Searches among numbers that several processes may hold together.

All that a search needs of the others is sums of counts: it is a generator that gives away what it counted here and is sent the sum
over all processes (`ranks.side_by_side`); one process answers itself (`by_itself`). Where each process adds to a place of its own, the
sum is what all of them tell (`everyone`).
"""

from collections.abc import Generator
from math import ceil
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

BINS_BITS = 11  # few enough for a first-level cache

Found = TypeVar("Found")
Search = Generator[Tensor, Tensor, Found]


def by_itself(search: Search[Found]) -> Found:
    """What a search finds where this process holds everything."""
    try:
        counted = next(search)
        while True:
            counted = search.send(counted)
    except StopIteration as end:
        found: Found = end.value
        return found


def everyone(mine: Tensor, place: int | None, places: int, longest: int) -> Search[Tensor]:
    """What each process tells.

    Args:
        mine: [..., n] int32, what this one tells.
        place: its own; None: it has none, and tells nothing.
        places: how many there are.
        longest: n or more, the same on all processes.

    Returns:
        [places, ..., longest] int32, with zeros where a process tells less.
    """
    told = torch.zeros(places, *mine.shape[:-1], longest, dtype=torch.int32)
    if place is not None:
        told[place, ..., : mine.shape[-1]] = mine
    return (yield told)


def descend(
    values: np.ndarray, numbers: np.ndarray | None, window: tuple[int, int], need: int
) -> Search[tuple[int, int, int]]:
    """The value at which the count of all processes' values, from the lowest on, reaches `need`.

    Args:
        values: integers; only those from `window[0]` to below `window[1]` count.
        numbers: how often each counts; None: once.
        need: 1 to the count of all.

    Returns:
        (value, how many of that value are needed, how many there are).
    """
    while True:
        low, high = window
        inside = (values >= low) & (values < high)
        values, numbers = values[inside], None if numbers is None else numbers[inside]
        shift = _shift_of(low, high)
        counts = yield bins_of((values - low) >> shift, numbers, ((high - low - 1) >> shift) + 1)
        window, need, most = narrowed(counts, window, shift, need)
        if shift == 0:
            return window[0], need, most


def narrowed(counts: Tensor, window: tuple[int, int], shift: int, need: int) -> tuple[tuple[int, int], int, int]:
    """The bin of a window that holds the wanted value, how many of those in it are needed, and how many there are."""
    low, high = window
    reached = counts.cumsum(0)
    place = int(torch.searchsorted(reached, need))
    before = int(reached[place - 1]) if place else 0
    return (low + (place << shift), min(high, low + ((place + 1) << shift))), need - before, int(counts[place])


def bins_of(values: np.ndarray, numbers: np.ndarray | None, bins: int) -> Tensor:
    """[bins] int64: how often each of 0, 1, ... is among the values, each of which counts `numbers` times, or once."""
    # PyTorch's takes a tenth of the time of NumPy's
    weights = None if numbers is None else torch.from_numpy(numbers)
    return torch.bincount(torch.from_numpy(values), weights, bins).long()


def _shift_of(low: int, high: int) -> int:
    """How many bits of a window's values one round leaves to the next ones, all of which take as many."""
    bits = (high - low - 1).bit_length()
    return bits - ceil(bits / max(1, ceil(bits / BINS_BITS)))
