"""Scope "row" where rows are cut by columns and lie on several processes: the threshold of each row, and who takes which ties.

Each process tells which key ends the low set among its own columns. The threshold of a row lies between the lowest and the highest of
these keys, and where columns are alike few others do: counts halve what is too much, and the rest travels. That is a kilobyte or two of
a row in some five rounds, and where columns differ more of them: 34 at the most, as a key has 31 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hftcore.kernels.reference import FINITE
from hftcore.parts import Part
from hftcore.searches import Search

FEW = 64  # keys of a row that travel; where there are more, a round that halves them takes less time


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
            told[columns.place] = mine.cpu()
        return (yield told)

    def below(low: Tensor, high: Tensor) -> Tensor:
        """[2, m]: how many keys here are below `low`, and how many up to `high`."""
        under, _, inside = _count(part, low, high + 1, torch.empty(0, dtype=torch.int32, device=part.weight.device))
        return torch.stack([under, under + inside])

    # shares that are rounded up add up to `count` or more, and one less of each to less than it: the threshold is not above all
    # ends of the shares, and not below all of them
    share = -(-count * part.weight.shape[1] // total)
    ends = yield from everyone(part.call("row_keys", share) if part.weight.numel() else torch.zeros(rows))
    low, high = ends.amin(0).long(), ends.amax(0).long()
    under, reached = (yield from everyone(below(low, high))).unbind(1)
    while bool(((reached - under).sum(0)[low < high] > FEW).any()):
        middle = (low + high) // 2
        half = yield from everyone(below(middle, middle)[1])
        is_lower = half.sum(0) >= count
        high, reached = torch.where(is_lower, middle, high), torch.where(is_lower, half, reached)
        low, under = torch.where(is_lower, low, middle + 1), torch.where(is_lower, under, half)
    ties = reached - under
    is_open = (low < high).nonzero().flatten()
    if len(is_open):
        width, need = int(ties[:, is_open].max()), count - under[:, is_open].sum(0)
        few = yield from everyone(_between(part, low, high, is_open, width))
        # NumPy's sort takes a tenth of the time of PyTorch's
        line = torch.from_numpy(np.sort(few.transpose(0, 1).flatten(1).numpy(), axis=1))
        key = line.gather(1, need[:, None] - 1)
        low[is_open] = key[:, 0].long()
        under[:, is_open] += (few < key).sum(2, dtype=torch.int32)
        ties[:, is_open] = (few == key).sum(2, dtype=torch.int32)
    quota = count - under.sum(0) - ties[: columns.place].sum(0)
    return low.int(), quota.clamp(0, part.weight.shape[1])


def _count(part: Part, low: Tensor, high: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = part.weight.device
    below, starts, inside = part.call("row_counts", low.int().to(device), high.int().to(device), out)
    return below.cpu(), starts.cpu(), inside.cpu()


def _between(part: Part, low: Tensor, high: Tensor, rows: Tensor, width: int) -> Tensor:
    """[rows, width]: the keys of some rows from `low` to `high`, and then what is above all keys."""
    ends = low.clone()
    ends[rows] = high[rows] + 1  # nothing of the other rows
    found = torch.empty(len(rows) * width, dtype=torch.int32, device=part.weight.device)
    _, starts, counts = _count(part, low, ends, found)
    column = torch.arange(width)
    at = (starts[rows, None] + column).clamp(max=len(found) - 1)
    return found.cpu()[at].where(column < counts[rows, None], FINITE)
