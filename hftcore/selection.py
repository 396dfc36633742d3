"""One exact threshold for a comparison group that spans whole matrices: scopes "matrix" and "model".

A sample proposes a window of keys. Where the keys inside fit into a small buffer, one pass over the weights collects them, and they
tell the threshold and where its ties are. Elsewhere passes count what lies below, inside (by bins) and above, which either confines the
wanted key to one bin or says on which side it is, until few enough are left. What is known is always a bracket [floor, ceiling), it
shrinks in every pass, and a bad sample costs one more pass, never exactness.

Several processes may hold the group together: `search_cut` is a search whose counts are added up over all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from torch import Tensor

from hftcore.backend import backend_for
from hftcore.collected import Threshold, collect, refuse_spoiled
from hftcore.errors import HftcoreError
from hftcore.kernels.reference import FINITE
from hftcore.parts import Maker, Part, Place
from hftcore.searches import BINS_BITS, Search, bins_of, by_itself
from hftcore.ties import last_tied, share_out

SAMPLE = 1 << 16
SMALL = 1 << 17  # weights that are collected all, for a sample would hardly be smaller
LARGEST_SAMPLE = 1 << 20  # where that makes one pass do, it is worth drawing
ROOM = 3 << 18  # keys that are collected at most of one matrix; a quarter of the memory that a selection may take
# of several matrices one weight in so many, which is a hundredth of bfloat16 weights, at most 64 MB, and up to twice that while they
# are searched
ONE_IN, LARGEST_ROOM = 200, 1 << 24
# bits of a sample's keys that are left out at first, and then; a histogram of so wide a window is exact
COARSE, FINE = 20, 11


@dataclass(frozen=True)
class Cut:
    """The low set: every key below `key`, and of the weights whose key equals it the first `quotas[i][r]` of row r of part i."""

    key: int
    quotas: list[Tensor]


def find_cut(parts: Sequence[Maker], sizes: Sequence[tuple[int, int]], count: int) -> Cut:
    """The cut that holds exactly the `count` lowest weights of all parts, in the order (key, part, row-major index).

    Args:
        parts: makers of the matrices, in position order; each is called once a pass, so that a part may be made or loaded lazily.
        sizes: (rows, columns) of each part.
        count: 0 to the number of weights.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    places, row = [], 0
    for rows, columns in sizes:
        places.append(Place(rows, columns, row, 0, columns))
        row += rows
    return by_itself(search_cut(parts, places, count, sum(rows * columns for rows, columns in sizes), row))


def search_cut(
    parts: Sequence[Maker],
    places: Sequence[Place],
    count: int,
    total: int,
    rows: int,
    rank: int = 0,
    processes: int = 1,
) -> Search[Cut]:
    """The search of `find_cut` in a group that several processes hold together; each finds the quotas of its own parts.

    Args:
        parts, places: what this process holds of each matrix, and where that lies.
        count, total, rows: weights in the low set, weights of the whole group, and rows of all its matrices.
        rank, processes: which one this is of how many; the more, the more keys they can collect.

    Raises, on every process:
        NonFiniteError: a score is NaN or infinite.
        HftcoreError: the parts of all processes do not make up the whole.
    """
    counted = [make for make, place in zip(parts, places, strict=True) if place.is_counted]
    firsts = [place.row for place in places if place.is_counted]
    room, most = ROOM, ROOM * processes
    if len(places) > 1:
        # each process as much as it has to count; some may only repeat what others have
        held = sum(place.rows * place.columns for place in places if place.is_counted)
        room = max(ROOM, min(LARGEST_ROOM, held // ONE_IN))
        most = max(ROOM, min(LARGEST_ROOM * processes, total // ONE_IN))
    window, expected, collects, is_cut = yield from _propose(parts, places, count, total, most, processes)
    few = most if collects and 0 < count < total else 0
    end = None
    if 0 < expected <= few:
        end = yield from collect(counted, firsts, count, window, room, rows, rank, processes)
    if end is None:
        bracket = yield from _confine(counted, count, total, window, few)
        if 0 < bracket.inside <= few:
            window = bracket.low, bracket.high
            end = yield from collect(counted, firsts, count, window, room, rows, rank, processes)
            if end is None:  # one process had more than its share of them
                bracket = yield from _confine(counted, count, total, window, 0)
    if end is None:
        end = Threshold(bracket.low, count - bracket.below, bracket.inside), None
    threshold, last = end
    if threshold.need in (0, threshold.ties):
        # a quota of all columns takes every tie without counting them
        return Cut(threshold.key, [_filled(place, place.columns if threshold.need else 0) for place in places])
    if last is None:
        counts = [make().call("tie_counts", threshold.key).cpu() for make in counted]
        last = yield from last_tied(counts, firsts, threshold.need, rows)
    quotas = yield from share_out(parts, places, threshold.key, last, is_cut)
    return Cut(threshold.key, quotas)


def find_threshold(parts: Sequence[Maker], sizes: Sequence[tuple[int, int]], count: int) -> Threshold:
    """Which key ends the `count` lowest weights of all parts, and how many of those that have it belong to them.

    Args and errors are those of `find_cut`.
    """
    total = sum(rows * columns for rows, columns in sizes)
    places = [Place(rows, columns, 0, 0, columns) for rows, columns in sizes]
    window, *_ = by_itself(_propose(parts, places, count, total, ROOM, 1))
    found = confine(parts, count, total, window, 0)
    return Threshold(found.low, count - found.below, found.inside)


@dataclass(frozen=True)
class Bracket:
    """Keys from `low` to below `high`, of which one is the wanted one; how many weights have keys below, and inside."""

    low: int
    high: int
    below: int
    inside: int


def confine(parts: Iterable[Maker], count: int, total: int, window: tuple[int, int], few: int) -> Bracket:
    """The wanted key alone, or a bracket of at most `few` weights, whichever comes first.

    Args:
        parts, count: as for `find_cut`; `parts` is gone through once a pass.
        total: how many weights there are.
        window: the keys to look among first.
        few: how many weights may be left; 0: go on until it is one key.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    return by_itself(_confine(parts, count, total, window, few))


def _confine(parts: Iterable[Maker], count: int, total: int, window: tuple[int, int], few: int) -> Search[Bracket]:
    floor, ceiling = 0, FINITE
    while True:
        low, high = window
        shift = max(0, (high - low - 1).bit_length() - BINS_BITS)
        bins = -(-(high - low) >> shift)
        counts = torch.zeros(bins + 3, dtype=torch.int64)
        for part in parts:
            found = part().call("score_histogram", low, shift, bins)
            # on a GPU, where they stay until all are added up, no part waits for the one before
            counts = counts.to(found.device) + found
        counts = yield counts.cpu()
        refuse_spoiled(int(counts[-1]))
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


def _propose(
    parts: Sequence[Maker], places: Sequence[Place], count: int, total: int, most: int, processes: int
) -> Search[tuple[tuple[int, int], int, bool, bool]]:
    """A window of keys that very likely holds the wanted one, four standard deviations of the sample's order statistic; how many
    weights that window is expected to hold; whether they can be collected at less than the cost of another pass; and whether some
    matrix is cut by columns."""
    counted = sum(place.rows * place.columns for place in places if place.is_counted)
    if processes == 1 and 0 < counted == total <= SMALL and _can_collect(parts[0]()):
        return (0, FINITE), total, True, False
    share = count / max(1, total)
    spread = 8 * sqrt(share * (1 - share))
    fitting = ceil((1.1 * spread * total / most) ** 2)  # for what the window holds to fit
    step = (
        max(1, total // max(SAMPLE, fitting if fitting <= LARGEST_SAMPLE else 0)) | 1
    )  # odd, not to keep hitting the same columns
    offset, drawn, dear = 0, [np.empty(0, dtype=np.int32)], 0
    for make, place in zip(parts, places, strict=True):
        size = place.rows * place.columns if place.is_counted else 0
        first = -offset % step
        offset += size
        if first < size:
            part = make()
            dear += not _can_collect(part)
            drawn.append(part.call("sampled_keys", first, step).cpu().numpy())
    sample = np.concatenate(drawn)
    facts = torch.tensor([offset, dear, sum(place.columns != place.width for place in places)])
    told = yield torch.cat([facts, bins_of(sample >> COARSE, None, 1 << (31 - COARSE))])
    held, dear, is_cut = told[:3].tolist()
    if held != total:
        raise HftcoreError(
            f"the shards of all processes hold {held} weights, the whole has {total}; give each part once"
        )
    reached = told[3:].cumsum(0)
    size = int(reached[-1])
    if size == 0:
        return (0, FINITE), 0, False, is_cut > 0
    middle, margin = share * size, spread / 2 * sqrt(size) + 1
    wanted = torch.tensor([max(0, int(middle - margin)), min(size - 1, ceil(middle + margin))])
    bins = torch.searchsorted(reached, wanted, right=True)
    before = reached[bins] - told[3:][bins]
    fine = yield torch.stack(
        [
            bins_of((sample[sample >> COARSE == place] - (place << COARSE)) >> FINE, None, 1 << (COARSE - FINE))
            for place in bins.tolist()
        ]
    )
    finer = before[:, None] + fine.cumsum(1)
    edges = torch.searchsorted(finer, wanted[:, None], right=True).flatten()
    low, high = ((bins << COARSE) + ((edges + torch.tensor([0, 1])) << FINE)).tolist()
    window = min(low, FINITE - 1), max(1, min(high, FINITE))
    among = int(finer[1, edges[1]] - finer[0, edges[0]] + fine[0, edges[0]])
    return window, ceil(among / size * total), not dear, is_cut > 0


def _can_collect(part: Part) -> bool:
    """Whether that costs less than another pass: on a GPU a pass over the weights is cheap, and compressing is not."""
    return part.weight.is_cpu and backend_for("cpu") != "triton"


def _filled(place: Place, quota: int) -> Tensor:
    return torch.full((place.rows,), quota, dtype=torch.int64)


def first_ties(counts: Tensor, need: int) -> Tensor:
    """Of ties counted by row, [M] int64, how many of each row are among the first `need`.

    >>> first_ties(torch.tensor([2, 0, 3]), 3)
    tensor([2, 0, 1])
    """
    return (need - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts)
