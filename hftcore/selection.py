"""One exact threshold for a comparison group that spans whole matrices: scopes "matrix" and "model".

A sample proposes a window of keys. Where the keys inside fit into a small buffer, one pass over the weights collects them, and they
tell the threshold and where its ties are. Elsewhere passes count what lies below, inside (by bins) and above, which either confines the
wanted key to one bin or says on which side it is, until few enough are left. What is known is always a bracket [floor, ceiling), it
shrinks in every pass, and a bad sample costs one more pass, never exactness.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from torch import Tensor

from hftcore.backend import backend_for, implementation
from hftcore.errors import NonFiniteError
from hftcore.kernels.reference import FINITE

SAMPLE = 1 << 16
LARGEST_SAMPLE = 1 << 19  # where that makes one pass do, it is worth drawing
ROOM = 3 << 18  # keys that are collected at most; a quarter of the memory that a selection may take
BINS_BITS = 11  # few enough for a first-level cache


@dataclass(frozen=True)
class Part:
    """One matrix of the group: [M, N] weight, [N] norm (root of the energy), and the reference of the same shape or None."""

    weight: Tensor
    norm: Tensor
    reference: Tensor | None = None

    def call(self, op: str, *args: object) -> Tensor:
        return implementation(op, self.weight.device)(self.weight, self.norm, self.reference, *args)


@dataclass(frozen=True)
class Threshold:
    """Where the low set ends: every key below `key`, and the first `need` of the `ties` weights whose key equals it."""

    key: int
    need: int
    ties: int


@dataclass(frozen=True)
class Cut:
    """The low set: every key below `key`, and of the weights whose key equals it the first `quotas[i][r]` of row r of part i."""

    key: int
    quotas: list[Tensor]


def find_cut(parts: Sequence[Callable[[], Part]], sizes: Sequence[tuple[int, int]], count: int) -> Cut:
    """The cut that holds exactly the `count` lowest weights of all parts, in the order (key, part, row-major index).

    Args and errors are those of `find_threshold`.
    """
    total = sum(rows * columns for rows, columns in sizes)
    window, expected, collects = _propose(parts, sizes, count / max(1, total), total)
    few = ROOM if collects and 0 < count < total else 0
    if 0 < expected <= few:
        cut = _collect(parts, sizes, count, window)
        if cut is not None:
            return cut
    found = confine(parts, count, total, window, few)
    if 0 < found.inside <= few:
        cut = _collect(parts, sizes, count, (found.low, found.high))
        if cut is not None:
            return cut
    need = count - found.below
    if need == found.inside:
        return Cut(found.low, _whole(sizes) if need else [torch.zeros(rows, dtype=torch.int64) for rows, _ in sizes])
    return Cut(found.low, _shared_out((part().call("tie_counts", found.low).cpu() for part in parts), need))


def find_threshold(
    parts: Sequence[Callable[[], Part]],
    sizes: Sequence[tuple[int, int]],
    count: int,
    reduce: Callable[[Tensor, str], Tensor] = lambda numbers, _: numbers,
) -> Threshold:
    """Which key ends the `count` lowest weights of all parts, and how many of those that have it belong to them.

    Args:
        parts: makers of the matrices, in position order; each is called once a pass, so that a part may be made or loaded lazily.
        sizes: (rows, columns) of each part.
        count: 0 to the number of weights.
        reduce: where other processes hold more of the group, reduce(numbers, "sum" | "min" | "max") over all of them, element by
            element; each process calls it equally often, and gets the same threshold.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    mine = sum(rows * columns for rows, columns in sizes)
    total = int(reduce(torch.tensor([mine]), "sum"))
    (low, high), _, _ = _propose(parts, sizes, count / max(1, total), mine)
    window = int(reduce(torch.tensor([low]), "min")), int(reduce(torch.tensor([high]), "max"))
    found = confine(parts, count, total, window, 0, reduce)
    return Threshold(found.low, count - found.below, found.inside)


@dataclass(frozen=True)
class Bracket:
    """Keys from `low` to below `high`, of which one is the wanted one; how many weights have keys below, and inside."""

    low: int
    high: int
    below: int
    inside: int


def confine(
    parts: Iterable[Callable[[], Part]],
    count: int,
    total: int,
    window: tuple[int, int],
    few: int,
    reduce: Callable[[Tensor, str], Tensor] = lambda numbers, _: numbers,
) -> Bracket:
    """The wanted key alone, or a bracket of at most `few` weights, whichever comes first.

    Args:
        parts, count, reduce: as for `find_threshold`; `parts` is gone through once a pass.
        total: how many weights there are, on all processes.
        window: the keys to look among first.
        few: how many weights may be left; 0: go on until it is one key.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    floor, ceiling = 0, FINITE
    while True:
        low, high = window
        shift = max(0, (high - low - 1).bit_length() - BINS_BITS)
        bins = -(-(high - low) >> shift)
        counts = torch.zeros(bins + 3, dtype=torch.int64)
        for part in parts:
            counts += part().call("score_histogram", low, shift, bins).cpu()
        counts = reduce(counts, "sum")
        _refuse(int(counts[-1]))
        if not 0 < count < total:
            # nothing or everything: no key is below 0, every finite key is below FINITE
            end = 0 if count == 0 else FINITE
            return Bracket(end, end, count, 0)
        below = int(counts[0])
        reached = below + counts[1:-2].cumsum(0)
        if count <= below:
            ceiling = low
            window = (floor, ceiling)
        elif count > int(reached[-1]):
            floor = low + (bins << shift)
            window = (floor, ceiling)
        else:
            place = int(torch.searchsorted(reached, count))
            start = low + (place << shift)
            floor, ceiling = start, start + (1 << shift)
            before = int(reached[place - 1]) if place else below
            inside = int(counts[1 + place])
            if shift == 0 or inside <= few:
                return Bracket(floor, ceiling, before, inside)
            window = (floor, ceiling)


def _collect(
    parts: Sequence[Callable[[], Part]], sizes: Sequence[tuple[int, int]], count: int, window: tuple[int, int]
) -> Cut | None:
    """The cut, from all keys in the window as one pass collects them; None where it does not hold the wanted one, or too many."""
    low, high = window
    keys = torch.empty(ROOM, dtype=torch.int32)
    below = spoiled = filled = 0
    starts, counts = [], []
    for part in parts:
        under, strange, start, inside = part().call("keys_between", low, min(high, FINITE), keys[filled:])
        starts.append(start + filled)
        counts.append(inside)
        below, spoiled, filled = below + under, spoiled + strange, filled + int(inside.sum())
        if filled > ROOM:
            return None
    _refuse(spoiled)
    place = count - below - 1
    if not 0 <= place < filled:
        return None
    found = keys[:filled].numpy()
    key = int(np.partition(found, place)[place])
    need = place + 1 - int((found < key).sum())
    ties = np.flatnonzero(found == key)
    if need == len(ties):
        return Cut(key, _whole(sizes))
    return Cut(key, _shared_out((_by_row(*runs, ties) for runs in zip(starts, counts, strict=True)), need))


def _by_row(starts: Tensor, counts: Tensor, places: np.ndarray) -> Tensor:
    """How many of the sorted `places` lie in each row's run, which begins at `starts` and is `counts` long."""
    first = starts.numpy()
    return torch.from_numpy(np.searchsorted(places, first + counts.numpy()) - np.searchsorted(places, first))


def _refuse(spoiled: int) -> None:
    if spoiled:
        raise NonFiniteError(
            f"weight has {spoiled} scores that are NaN or infinite; repair the weights or calibrate again"
        )


def _propose(
    parts: Sequence[Callable[[], Part]], sizes: Sequence[tuple[int, int]], share: float, total: int
) -> tuple[tuple[int, int], int, bool]:
    """A window of keys that very likely holds the wanted one, four standard deviations of the sample's order statistic; how many
    weights that window is expected to hold; and whether they can be collected at less than the cost of another pass."""
    spread = 8 * sqrt(share * (1 - share))
    wanted = ceil((1.1 * spread * total / ROOM) ** 2)  # for what the window holds to fit
    step = (
        max(1, total // max(SAMPLE, wanted if wanted <= LARGEST_SAMPLE else 0)) | 1
    )  # odd, not to keep hitting the same columns
    offset, drawn, collects = 0, [], True
    for make, (rows, columns) in zip(parts, sizes, strict=True):
        size = rows * columns
        first = -offset % step
        offset += size
        if first < size:
            part = make()
            # on a GPU a pass over the weights is cheap, and compressing is not
            collects &= part.weight.is_cpu and backend_for("cpu") != "triton"
            drawn.append(part.call("sampled_keys", first, step).cpu().numpy())
    if not drawn:
        return (0, FINITE), 0, False
    sample = np.concatenate(drawn)
    middle, margin = share * len(sample), spread / 2 * sqrt(len(sample)) + 1
    first, last = max(0, int(middle - margin)), min(len(sample) - 1, ceil(middle + margin))
    sample.partition((first, last))
    low, high = int(sample[first]), int(sample[last]) + 1
    window = min(low, FINITE - 1), max(1, min(high, FINITE))
    return window, ceil((last - first + 1) / len(sample) * total), collects


def _whole(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Quotas for all ties, which `cut` takes without counting them."""
    return [torch.full((rows,), columns, dtype=torch.int64) for rows, columns in sizes]


def _shared_out(ties: Iterable[Tensor], need: int) -> list[Tensor]:
    """Of the ties of each part, counted by row, how many of each row belong to the low set: the first `need` of all, in position order."""
    quotas = []
    for counts in ties:
        quotas.append(first_ties(counts, need))
        need = max(0, need - int(counts.sum()))
    return quotas


def first_ties(counts: Tensor, need: int) -> Tensor:
    """Of ties counted by row, [M] int64, how many of each row are among the first `need`.

    >>> first_ties(torch.tensor([2, 0, 3]), 3)
    tensor([2, 0, 1])
    """
    return (need - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts)
