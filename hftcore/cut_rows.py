"""Scope "row" where rows are cut by columns and lie on several processes: the threshold of each row, and who takes which ties.

Each process tells which key ends the low set among its own columns. The threshold of a row lies between the lowest and the highest of
these keys. Where the processes' columns are alike few other keys lie there: counts halve what is too much, and the rest travels. That
takes half a kilobyte of a row and five rounds on two processes, eight or nine on 8 to 32; where columns differ more rounds, 33 at the
most, as a key has 31 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hftcore.kernels.reference import FINITE
from hftcore.parts import Part
from hftcore.searches import Search

FEW = 64  # keys of a row, of all processes, that travel; where there are more, a round that halves them takes less time


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

    def everyone(mine: Tensor) -> Search[Tensor]:
        """[processes that count, ...] int32: what each of them tells."""
        told = torch.zeros(len(columns.widths), *mine.shape, dtype=torch.int32)
        if columns.is_counted:
            told[columns.place] = mine
        return (yield told)

    # shares that are rounded up add up to `count` or more, and these shares less one each to less than `count`: the threshold is
    # not above all ends of the shares, and not below all of them
    share = -(-count * part.weight.shape[1] // total)
    has_some = part.weight.numel() > 0
    ends = yield from everyone(part.call("row_keys", share).cpu() if has_some else torch.zeros(rows, dtype=torch.int32))
    low, high = ends.amin(0).long(), ends.amax(0).long()
    told = yield from everyone(torch.stack(_counts(part, low, high + 1)))
    below, reached = told[:, 0], told.sum(1, dtype=torch.int32)
    while bool(((reached - below).sum(0)[low < high] > FEW).any()):
        middle = (low + high) // 2
        half = yield from everyone(_counts(part, middle + 1, middle + 1)[0])
        is_lower = half.sum(0) >= count
        high, reached = torch.where(is_lower, middle, high), torch.where(is_lower, half, reached)
        low, below = torch.where(is_lower, low, middle + 1), torch.where(is_lower, below, half)
    inside = reached - below
    under, ties_before = below.sum(0), inside[: columns.place].sum(0)
    is_open = (low < high).nonzero().flatten()
    if len(is_open):
        sizes, first = inside[:, is_open].sum(0), ties_before[is_open]
        line = torch.zeros(len(is_open), int(sizes.max()), dtype=torch.int32)
        if columns.is_counted:
            _put_between(part, low, high, is_open, line, first)
        # the keys of all processes, from left to right
        line = yield line
        slot = torch.arange(line.shape[1])
        line[slot >= sizes[:, None]] = FINITE
        # NumPy's sort takes a tenth of the time of PyTorch's
        ascending = torch.from_numpy(np.sort(line.numpy(), axis=1))
        key = ascending.gather(1, (count - under[is_open] - 1)[:, None])
        low[is_open] = key[:, 0].long()
        under[is_open] += (line < key).sum(1)
        ties_before[is_open] = ((line == key) & (slot < first[:, None])).sum(1)
    return low.int(), (count - under - ties_before).clamp(0, part.weight.shape[1])


def _counts(part: Part, low: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """[m], [m]: how many keys of each row are below `low`, and how many from there to below `end`."""
    device = part.weight.device
    nowhere = torch.empty(0, dtype=torch.int32, device=device)
    below, _, inside = part.call("row_counts", low.int().to(device), end.int().to(device), nowhere)
    return below.cpu(), inside.cpu()


def _put_between(part: Part, low: Tensor, high: Tensor, rows: Tensor, line: Tensor, first: Tensor) -> None:
    """Write the keys of some rows from `low` to `high` into the rows of `line`, each from its place `first` on."""
    device = part.weight.device
    ends = low.clone()
    ends[rows] = high[rows] + 1  # nothing of the other rows
    found = torch.empty(line.numel(), dtype=torch.int32, device=device)
    _, starts, counts = part.call("row_counts", low.int().to(device), ends.int().to(device), found)
    starts, counts = starts.cpu()[rows], counts.cpu()[rows]
    row = torch.arange(len(rows)).repeat_interleave(counts)
    nth = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    line[row, first[row] + nth] = found.cpu()[starts[row] + nth]
