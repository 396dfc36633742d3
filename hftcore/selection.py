"""One exact threshold for a comparison group that spans whole matrices: scopes "matrix" and "model".

The threshold key is found by counting keys in windows. A sample proposes the first window; each pass over the weights then counts
what lies below, inside (by bins) and above, which either confines the wanted key to one bin or says on which side it is. What is
known is always a bracket [floor, ceiling), it shrinks in every pass, and a bad sample costs one more pass, never exactness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from torch import Tensor

from hftcore.backend import implementation
from hftcore.errors import NonFiniteError
from hftcore.kernels.reference import FINITE

SAMPLE = 1 << 16
BINS_BITS = (
    11  # few enough for a first-level cache; two passes then tell apart the 2**22 keys of the widest likely window
)


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
    found = find_threshold(parts, sizes, count)
    return Cut(found.key, _quotas(parts, sizes, found))


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
    low, high = _proposal(parts, sizes, count / max(1, total), mine)
    window = int(reduce(torch.tensor([low]), "min")), int(reduce(torch.tensor([high]), "max"))
    floor, ceiling = 0, FINITE
    while True:
        low, high = window
        shift = max(0, (high - low - 1).bit_length() - BINS_BITS)
        bins = -(-(high - low) >> shift)
        counts = torch.zeros(bins + 3, dtype=torch.int64)
        for part in parts:
            counts += part().call("score_histogram", low, shift, bins).cpu()
        counts = reduce(counts, "sum")
        if int(counts[-1]):
            raise NonFiniteError(
                f"weight has {int(counts[-1])} scores that are NaN or infinite; repair the weights or calibrate again"
            )
        if not 0 < count < total:
            # nothing or everything: no key is below 0, every finite key is below FINITE
            return Threshold(0 if count == 0 else FINITE, 0, 0)
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
            if shift == 0:
                before = int(reached[place - 1]) if place else below
                return Threshold(start, count - before, int(counts[1 + place]))
            floor, ceiling = start, start + (1 << shift)
            window = (floor, ceiling)


def _proposal(
    parts: Sequence[Callable[[], Part]], sizes: Sequence[tuple[int, int]], share: float, total: int
) -> tuple[int, int]:
    """A window of keys that very likely holds the wanted one: four standard deviations of the sample's order statistic."""
    step = max(1, total // SAMPLE) | 1  # odd, so that it does not keep hitting the same columns
    offset, drawn = 0, []
    for part, (rows, columns) in zip(parts, sizes, strict=True):
        size = rows * columns
        first = -offset % step
        offset += size
        if first < size:
            drawn.append(part().call("sampled_keys", first, step).cpu().numpy())
    if not drawn:
        return 0, FINITE
    sample = np.concatenate(drawn)
    middle, margin = share * len(sample), 4 * sqrt(share * (1 - share) * len(sample)) + 1
    first, last = max(0, int(middle - margin)), min(len(sample) - 1, ceil(middle + margin))
    sample.partition((first, last))
    low, high = int(sample[first]), int(sample[last]) + 1
    return min(low, FINITE - 1), max(1, min(high, FINITE))


def _quotas(parts: Sequence[Callable[[], Part]], sizes: Sequence[tuple[int, int]], found: Threshold) -> list[Tensor]:
    """How many ties of each row belong to the low set: the first `need` of all, in position order."""
    if found.need == found.ties:
        return [torch.full((rows,), columns if found.need else 0, dtype=torch.int64) for rows, columns in sizes]
    need = found.need
    quotas = []
    for part in parts:
        counts = part().call("tie_counts", found.key).cpu()
        quotas.append(first_ties(counts, need))
        need = max(0, need - int(counts.sum()))
    return quotas


def first_ties(counts: Tensor, need: int) -> Tensor:
    """Of ties counted by row, [M] int64, how many of each row are among the first `need`.

    >>> first_ties(torch.tensor([2, 0, 3]), 3)
    tensor([2, 0, 1])
    """
    return (need - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts)
