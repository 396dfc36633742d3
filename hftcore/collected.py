"""The threshold of a comparison group, and the row in which its ties end, from the keys in a window as one pass collects them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hftcore.errors import NonFiniteError
from hftcore.kernels.reference import FINITE
from hftcore.parts import Maker
from hftcore.searches import BINS_BITS, Search, bins_of, descend, everyone, narrowed
from hftcore.ties import Last

# places for keys that travel with their rows, in one round: each process has as many as all have keys. At most 128 KB of a matrix or
# model; where that would be more, counts tell the same in two to four rounds
LISTED = 1 << 14


@dataclass(frozen=True)
class Threshold:
    """Where the low set ends: every key below `key`, and the first `need` of the `ties` weights whose key equals it."""

    key: int
    need: int
    ties: int


def collect(
    parts: Sequence[Maker],
    firsts: Sequence[int],
    count: int,
    window: tuple[int, int],
    room: int,
    rows: int,
    rank: int,
    processes: int,
) -> Search[tuple[Threshold, Last | None] | None]:
    """The threshold, and where its ties end if not all go.

    None where the window does not hold the threshold, or more keys than a process has room for.

    Args:
        parts, firsts: the matrices that this process counts, and the row of the group at which each begins.
        count: weights in the low set.
        window: keys from the one to below the other.
        room: how many keys this process may collect.
        rows: of the whole group.
        rank, processes: which process this is, of how many.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    low, high = window
    keys = torch.empty(room, dtype=torch.int32)
    below = spoiled = filled = 0
    starts, counts = [], []
    for part in parts:
        under, strange, start, inside = part().call("keys_between", low, min(high, FINITE), keys[filled:])
        starts.append(start + filled)
        counts.append(inside)
        below, spoiled, filled = below + under, spoiled + strange, filled + int(inside.sum())
        if filled > room:
            break
    found = keys[: filled if filled <= room else 0].numpy()
    facts = torch.tensor([below, spoiled, filled, filled > room])
    shift = max(0, (high - low - 1).bit_length() - BINS_BITS)
    # one process partitions its keys, which is faster than to count them
    counted = found[: len(found) if processes > 1 else 0]
    told = yield torch.cat([facts, bins_of((counted - low) >> shift, None, ((high - low - 1) >> shift) + 1)])
    below, spoiled, inside, is_too_much = told[:4].tolist()
    refuse_spoiled(spoiled)
    if is_too_much or not 0 < count - below <= inside:
        return None
    need = count - below
    if processes == 1:
        key = int(np.partition(found, need - 1)[need - 1])
        ties = np.flatnonzero(found == key)
        need, most = need - int((found < key).sum()), len(ties)
    else:
        (low, high), need, most = narrowed(told[4:], window, shift, need)
        if most * processes <= LISTED and rows < 1 << 31:
            at = np.flatnonzero((found >= low) & (found < high))
            run_rows, run_starts = _runs(firsts, starts, counts)
            own = np.stack([found[at], run_rows[np.searchsorted(run_starts, at, "right") - 1]])
            # one more each, for 0 to say that there is none
            every = yield from everyone(torch.from_numpy(own + 1), rank, processes, most)
            pairs = every.transpose(0, 1).flatten(1)
            return _among(pairs[:, pairs[0] > 0].numpy() - 1, need)
        key = low
        if high - low > 1:
            key, need, most = yield from descend(found, None, (low, high), need)
        ties = np.flatnonzero(found == key)
    if need == most:
        return Threshold(key, need, most), None
    run_rows, run_starts = _runs(firsts, starts, counts)
    tied = np.diff(np.searchsorted(ties, run_starts), append=len(ties))
    last = yield from descend(run_rows, tied, (0, rows), need)
    return Threshold(key, need, most), Last(*last)


def refuse_spoiled(scores: int) -> None:
    if scores:
        raise NonFiniteError(
            f"weight has {scores} scores that are NaN or infinite; repair the weights or calibrate again"
        )


def _among(pairs: np.ndarray, need: int) -> tuple[Threshold, Last]:
    """Where the `need` lowest of (key, row) pairs end."""
    key, row = pairs
    order = np.lexsort((row, key))
    key, row = key[order], row[order]
    first, end = np.searchsorted(key, key[need - 1], "left"), np.searchsorted(key, key[need - 1], "right")
    threshold = Threshold(int(key[need - 1]), need - int(first), int(end - first))
    tied, last = row[first:end], int(row[need - 1])
    before, after = np.searchsorted(tied, last, "left"), np.searchsorted(tied, last, "right")
    return threshold, Last(last, threshold.need - int(before), int(after - before))


def _runs(firsts: Sequence[int], starts: list[Tensor], counts: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the group, and where the keys of each begin, which end where the next begin; rows without keys are left out."""
    if not starts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    rows = np.concatenate([first + np.arange(len(run)) for first, run in zip(firsts, counts, strict=True)])
    start, count = torch.cat(starts).numpy(), torch.cat(counts).numpy()
    rows, start = rows[count > 0], start[count > 0]
    order = np.argsort(start, kind="stable")  # threads put their rows side by side in any order
    return rows[order], start[order]
