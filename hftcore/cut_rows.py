"""Scope "row" where rows are cut by columns and lie on several processes: the threshold of each row, and who takes which ties.

Each process tells which key ends the low set among its own columns. The threshold of a row lies between the lowest and the highest of
these keys. Where the processes' columns are alike few other keys lie there, and they travel: three rounds are all on two to four
processes, and some 25 keys of a row of 4,096 weights from each of two. Passes that count halve what would be more, such as on 32
processes twice; where columns differ that makes 33 rounds at the most, as a key has 31 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hftcore.backend import implementation
from hftcore.kernels.reference import FINITE
from hftcore.parts import Part
from hftcore.searches import Search, everyone

ROOM = 256  # keys of a row on average, of all processes, that travel and are in memory; a round halves what is more


@dataclass(frozen=True)
class Columns:
    """How rows are cut.

    Fields:
        widths: columns of each process that counts and has some, from left to right.
        place: how many of these processes lie to the left of this one.
        is_counted: whether this process is one of them; False where it repeats what another one has, or has no columns.
    """

    widths: Sequence[int]
    place: int
    is_counted: bool


def row_cuts(part: Part, columns: Columns, count: int) -> Search[tuple[Tensor, Tensor]]:
    """The cuts that hold the `count` lowest weights of each row, in the order (key, column).

    Args:
        part: all rows of this process's columns; scores are finite.
        columns: how the rows are cut.
        count: 0 to all columns.

    Returns:
        [m] int32 and [m] int64: every key of a row that is below the one, and the first of those that equal it, as many as the other.
    """
    rows, total = len(part.weight), sum(columns.widths)
    if count in (0, total):
        return torch.full((rows,), FINITE if count else 0, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)

    place, processes = columns.place if columns.is_counted else None, len(columns.widths)

    def told(mine: Tensor) -> Search[Tensor]:
        return everyone(mine, place, processes, rows)

    # shares that are rounded up add up to `count` or more, and these shares less one each to less than `count`: the threshold is
    # not above all ends of the shares, and not below all of them
    share = -(-count * part.weight.shape[1] // total)
    has_some = part.weight.numel() > 0
    ends = yield from told(part.call("row_keys", share).cpu() if has_some else torch.zeros(rows, dtype=torch.int32))
    low, high = ends.amin(0).long(), ends.amax(0).long()
    keys = torch.empty(ROOM * rows, dtype=torch.int32, device=part.weight.device)
    own = _counts(part, low, high, keys)
    counts = yield from told(torch.stack([own.below, own.inside]))
    below, reached, is_collected = counts[:, 0], counts.sum(1), True
    while processes * int((reached - below)[:, low < high].sum(1).max()) > ROOM * rows:
        middle, is_collected = (low + high) // 2, False
        half = yield from told(_counts(part, middle + 1, middle, keys[:0]).below)
        is_lower = half.sum(0) >= count
        high, reached = torch.where(is_lower, middle, high), torch.where(is_lower, half, reached)
        low, below = torch.where(is_lower, low, middle + 1), torch.where(is_lower, below, half)
    need, inside, is_open = count - below.sum(0), reached - below, low < high
    quota = need - inside[: columns.place].sum(0)
    if is_open.any():
        listed = inside[:, is_open].long()
        if not (is_collected and is_open.all()):
            own = _counts(part, torch.where(is_open, low, high + 1), high, keys)
        line = yield from everyone(_by_row(keys, own), place, processes, int(listed.sum(1).max()))
        key, quota[is_open] = implementation("row_merge", line.device)(line, listed, need[is_open], columns.place)
        low[is_open] = key.long()
    return low.int(), quota.clamp(0, part.weight.shape[1])


@dataclass(frozen=True)
class _Counts:
    """[m] each: how many keys of a row are below a window, how many inside, and where these begin in what was collected."""

    below: Tensor
    inside: Tensor
    starts: Tensor


def _counts(part: Part, low: Tensor, high: Tensor, keys: Tensor) -> _Counts:
    """Of the keys from `low` to `high` of each row, which are collected in `keys` if they fit."""
    below, starts, inside = part.call("row_counts", low.int().to(keys.device), (high + 1).int().to(keys.device), keys)
    return _Counts(below.cpu(), inside.cpu(), starts.cpu())


def _by_row(keys: Tensor, counts: _Counts) -> Tensor:
    """What was collected, row by row: threads put their rows side by side in any order."""
    first, filled = counts.inside.cumsum(0) - counts.inside, int(counts.inside.sum())
    found = keys[:filled].cpu()
    if torch.equal(counts.starts, first):
        return found
    return found[(counts.starts - first).repeat_interleave(counts.inside) + torch.arange(filled)]
