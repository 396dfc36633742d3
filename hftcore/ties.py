"""Which of the weights that have the threshold's key belong to the low set: the first ones in position order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hftcore.kernels.reference import keys
from hftcore.parts import Maker, Part, Place
from hftcore.searches import Search, descend

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Last:
    """Where the ties of the low set end: all of the rows above `row` of the group, and `need` of the `most` in that row."""

    row: int
    need: int
    most: int


def last_tied(ties: Sequence[Tensor], firsts: Sequence[int], need: int, rows: int) -> Search[Last]:
    """The row in which the first `need` ties end.

    Args:
        ties: [rows] int64 of each part that counts, how many weights of a row have the key.
        firsts: row of the group at which each of them begins.
        need: how many ties belong to the low set, fewer than there are on all processes.
        rows: of the whole group.
    """
    tied = [counts.nonzero().flatten() for counts in ties]
    last = yield from descend(
        np.concatenate([_NONE, *(first + own.numpy() for first, own in zip(firsts, tied, strict=True))]),
        np.concatenate([_NONE, *(counts[own].numpy() for counts, own in zip(ties, tied, strict=True))]),
        (0, rows),
        need,
    )
    return Last(*last)


def share_out(
    parts: Sequence[Maker], places: Sequence[Place], key: int, last: Last, is_cut: bool
) -> Search[list[Tensor]]:
    """How many of the ties in each row of each part belong to the low set.

    Args:
        parts, places: what this process holds.
        key: of the threshold.
        last: where the ties of the low set end.
        is_cut: whether some process holds only some of a matrix's columns.
    """
    row = last.row
    # below that row every tie goes with the low set, above it none
    quotas = [((torch.arange(place.rows) + place.row) < row) * place.columns for place in places]
    here = [index for index, place in enumerate(places) if 0 <= row - place.row < place.rows]
    if is_cut and last.need < last.most:
        columns = {index: _tied_columns(parts[index](), places[index], row, key) for index in here}
        told = [found for index, found in columns.items() if places[index].is_counted]
        end, *_ = yield from descend(
            np.concatenate([_NONE, *told]), None, (0, max(place.width for place in places)), last.need
        )
        for index, found in columns.items():
            quotas[index][row - places[index].row] = int((found <= end).sum())
    else:
        for index in here:
            # all of them, or those of a row that lies here whole
            quotas[index][row - places[index].row] = places[index].columns if last.need == last.most else last.need
    return quotas


def _tied_columns(part: Part, place: Place, row: int, key: int) -> np.ndarray:
    """Columns of the matrix at which a row of the part has the key."""
    one = slice(row - place.row, row - place.row + 1)
    found = keys(part.weight[one], part.norm, None if part.reference is None else part.reference[one])
    return place.column + (found[0] == key).nonzero().flatten().cpu().numpy()
