"""Which of the weights that have the threshold's key belong to the low set: the first ones in position order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hftcore.kernels.reference import keys
from hftcore.parts import Maker, Part, Place
from hftcore.searches import Search, descend

_NONE = np.empty(0, dtype=np.int64)


def share_out(
    parts: Sequence[Maker],
    places: Sequence[Place],
    ties: Sequence[Tensor],
    key: int,
    need: int,
    rows: int,
    is_cut: bool,
) -> Search[list[Tensor]]:
    """How many of the ties in each row of each part belong to the low set, the first `need` of all in position order.

    Args:
        parts, places: what this process holds.
        ties: [rows] int64 of each part that counts, how many weights of a row have the key; some more than `need`, on all processes.
        key: of the threshold.
        need: how many of the ties belong to the low set.
        rows: of all matrices of the group.
        is_cut: whether some process holds only some of a matrix's columns.
    """
    firsts = [place.row for place in places if place.is_counted]
    tied = [counts.nonzero().flatten() for counts in ties]
    row, need, most = yield from descend(
        np.concatenate([_NONE, *(first + own.numpy() for first, own in zip(firsts, tied, strict=True))]),
        np.concatenate([_NONE, *(counts[own].numpy() for counts, own in zip(ties, tied, strict=True))]),
        (0, rows),
        need,
    )
    # below that row every tie goes with the low set, above it none
    quotas = [((torch.arange(place.rows) + place.row) < row) * place.columns for place in places]
    here = [index for index, place in enumerate(places) if 0 <= row - place.row < place.rows]
    if is_cut and need < most:
        columns = {index: _tied_columns(parts[index](), places[index], row, key) for index in here}
        told = [found for index, found in columns.items() if places[index].is_counted]
        last, *_ = yield from descend(
            np.concatenate([_NONE, *told]), None, (0, max(place.width for place in places)), need
        )
        for index, found in columns.items():
            quotas[index][row - places[index].row] = int((found <= last).sum())
    else:
        for index in here:
            # all of them, or those of a row that lies here whole
            quotas[index][row - places[index].row] = places[index].columns if need == most else need
    return quotas


def _tied_columns(part: Part, place: Place, row: int, key: int) -> np.ndarray:
    """Columns of the matrix at which a row of the part has the key."""
    one = slice(row - place.row, row - place.row + 1)
    found = keys(part.weight[one], part.norm, None if part.reference is None else part.reference[one])
    return place.column + (found[0] == key).nonzero().flatten().cpu().numpy()


def ties_by_row(starts: Tensor, counts: Tensor, places: np.ndarray) -> Tensor:
    """How many of the sorted `places` lie in each row's run, which begins at `starts` and is `counts` long."""
    first = starts.numpy()
    return torch.from_numpy(np.searchsorted(places, first + counts.numpy()) - np.searchsorted(places, first))
