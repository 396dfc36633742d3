"""The ops in plain PyTorch, with bounded memory, on any device: the `torch` backend.

Matrices are walked in bands of rows, so that no temporary is larger than a few times `BAND` elements.
The contract of the arguments is in `kernels/README.md`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hftcore.kernels.reference import FINITE, GOLDEN, keys, pack, unpack

BAND = 1 << 20  # elements of a temporary


def bands(weight: Tensor) -> Iterator[slice]:
    """Row ranges of at most `BAND` elements (one row at least)."""
    rows = max(1, BAND // max(1, weight.shape[1]))
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def _at(reference: Tensor | None, band: slice) -> Tensor | None:
    return None if reference is None else reference[band]


def _write(weight: Tensor, reference: Tensor | None, mask: Tensor | None, band: slice, removed: Tensor) -> None:
    if mask is not None:
        mask[band] = pack(removed)
    elif reference is None:
        weight[band].masked_fill_(removed, 0)
    else:
        weight[band] = torch.where(removed, reference[band], weight[band])


def column_energy(x: Tensor, keep: Tensor | None) -> Tensor:
    tokens, columns = x.shape
    total = torch.zeros(columns, dtype=torch.float64, device=x.device)
    # PyTorch splits the sum of a single column over threads from 32,768 elements on, which would move the last bits
    step = 1 << 14 if columns == 1 else max(1, BAND // max(1, columns))
    for start in range(0, tokens, step):
        square = x[start : start + step].double().square_()
        if keep is not None:
            square = square.masked_fill_(~keep[start : start + step, None], 0)
        total += square.sum(dim=0)
    return total.float()


def empty_mask(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return torch.empty((rows, -(-columns // 8)), dtype=torch.uint8, device=weight.device)


def nonfinite(weight: Tensor, norm: Tensor, reference: Tensor | None) -> int:
    count = sum((keys(weight[band], norm, _at(reference, band)) >= FINITE).sum() for band in bands(weight))
    return int(count)


def _low(key: Tensor, count: int) -> Tensor:
    """Of each last axis, the `count` first entries in the order (key, position)."""
    if count in (0, key.shape[-1]):
        return torch.full_like(key, count > 0, dtype=torch.bool)
    threshold = _nth(key, count)[..., None]
    below = key < threshold
    tie = key == threshold
    return below | (tie & (tie.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def _nth(key: Tensor, count: int) -> Tensor:
    """Of each last axis, the `count`-th lowest key."""
    # finite keys read as floats order the same way, and PyTorch's selection of floats is the tuned one
    return key.view(torch.float32).kthvalue(count, dim=-1).values.view(torch.int32)


def _prune(
    weight: Tensor, norm: Tensor, reference: Tensor | None, width: int, count: int, invert: bool, mask: Tensor | None
) -> int:
    """Groups of `width` consecutive columns."""
    spoiled = 0
    if width == 0:
        return spoiled
    if mask is None and nonfinite(weight, norm, reference):
        mask = empty_mask(weight)  # to count them, and leave the weights alone
    for band in bands(weight):
        key = keys(weight[band], norm, _at(reference, band)).unflatten(1, (-1, width))
        bad = (key >= FINITE).any(-1, keepdim=True)
        removed = (_low(key.masked_fill(bad, 0), count) ^ invert) & ~bad
        spoiled += int(bad.sum())
        _write(weight, reference, mask, band, removed.flatten(1))
    return spoiled


def prune_rows(
    weight: Tensor, norm: Tensor, reference: Tensor | None, count: int, invert: bool, mask: Tensor | None
) -> int:
    return _prune(weight, norm, reference, weight.shape[1], count, invert, mask)


def prune_groups(
    weight: Tensor, norm: Tensor, reference: Tensor | None, n: int, m: int, invert: bool, mask: Tensor | None
) -> int:
    return _prune(weight, norm, reference, m, n, invert, mask)


def score_histogram(weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, shift: int, bins: int) -> Tensor:
    total = torch.zeros(bins + 3, dtype=torch.int64, device=weight.device)
    for band in bands(weight):
        key = keys(weight[band], norm, _at(reference, band)).flatten()
        # a key below `low` wraps to a negative window, which clamps to place 0
        place = (((key.long() - low) >> shift) + 1).clamp_(0, bins + 1)
        total += torch.bincount(place.masked_fill_(key >= FINITE, bins + 2), minlength=bins + 3)
    return total


def sampled_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, first: int, step: int) -> Tensor:
    at = torch.arange(first, weight.numel(), step, device=weight.device)
    row, column = at // weight.shape[1], at % weight.shape[1]
    other = None if reference is None else reference[row, column]
    return keys(weight[row, column], norm[column], other)


def keys_between(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, high: int, out: Tensor
) -> tuple[int, int, Tensor, Tensor]:
    below, spoiled, found = 0, 0, 0
    counts = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    for band in bands(weight):
        key = keys(weight[band], norm, _at(reference, band))
        below += int((key < low).sum())
        spoiled += int((key >= FINITE).sum())
        inside = (key >= low) & (key < high)
        counts[band] = inside.sum(dim=1)
        chosen = key[inside][: len(out) - found]
        out[found : found + len(chosen)] = chosen
        found += len(chosen)
    return below, spoiled, counts.cumsum(0) - counts, counts


def tie_counts(weight: Tensor, norm: Tensor, reference: Tensor | None, key: int) -> Tensor:
    ties = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    for band in bands(weight):
        ties[band] = (keys(weight[band], norm, _at(reference, band)) == key).sum(dim=1)
    return ties


def cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    key: int,
    quota: Tensor,
    invert: bool,
    mask: Tensor | None,
) -> None:
    for band in bands(weight):
        _cut(weight, norm, reference, band, key, quota, invert, mask)


def _cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    band: slice,
    key: int | Tensor,
    quota: Tensor,
    invert: bool,
    mask: Tensor | None,
) -> None:
    """One band; `key` is one for all of it, or one a row."""
    every = keys(weight[band], norm, _at(reference, band))
    tie = every == key
    low = (every < key) | (tie & (tie.cumsum(dim=1) <= quota[band, None]))
    _write(weight, reference, mask, band, low ^ invert)


def row_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, count: int) -> Tensor:
    key = torch.empty(weight.shape[0], dtype=torch.int32, device=weight.device)
    for band in bands(weight):
        key[band] = _nth(keys(weight[band], norm, _at(reference, band)), count)
    return key


def row_counts(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: Tensor, high: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    below, counts = torch.zeros(2, weight.shape[0], dtype=torch.int64, device=weight.device)
    found = 0
    for band in bands(weight):
        key = keys(weight[band], norm, _at(reference, band))
        under = key < low[band, None]
        inside = (key < high[band, None]) & ~under
        below[band], counts[band] = under.sum(1), inside.sum(1)
        if found < len(out):
            chosen = key[inside][: len(out) - found]
            out[found : found + len(chosen)] = chosen
            found += len(chosen)
    return below, counts.cumsum(0) - counts, counts


def row_cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    key: Tensor,
    quota: Tensor,
    invert: bool,
    mask: Tensor,
) -> None:
    for band in bands(weight):
        _cut(weight, norm, reference, band, key[band, None], quota, invert, mask)


def row_merge(keys: Tensor, counts: Tensor, need: Tensor, place: int) -> tuple[Tensor, Tensor]:
    found, ends = (torch.empty_like(need), torch.empty_like(need)), counts.cumsum(1)
    step = max(1, BAND * len(need) // max(1, int(counts.sum())))
    for start in range(0, len(need), step):
        band = slice(start, start + step)
        own = zip(keys, ends[:, band] - counts[:, band], ends[:, band], strict=True)
        runs = [line[first[0] : last[-1]] for line, first, last in own]
        for whole, part in zip(found, _merge(runs, counts[:, band], need[band], place), strict=True):
            whole[band] = part
    return found[0].int(), found[1]


def _merge(runs: list[Tensor], counts: Tensor, need: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """One band of rows, of which each process has one of the runs."""
    rows = torch.arange(len(need)).repeat(len(counts)).repeat_interleave(counts.flatten())
    told = rows << 31 | torch.cat(runs)
    ordered, first = told.sort().values, counts.sum(0).cumsum(0) - counts.sum(0)
    last = ordered[first + need - 1]
    before = int(counts[:place].sum())
    ties = rows[:before][told[:before] == last[rows[:before]]].bincount(minlength=len(need))
    left = need - (torch.searchsorted(ordered, last) - first) - ties
    return last & 0x7FFFFFFF, left.clamp(min=0)


def block_scores(weight: Tensor, norm: Tensor, reference: Tensor | None, bm: int, bn: int) -> Tensor:
    scores = torch.empty(weight.shape[0] // bm, weight.shape[1] // bn, dtype=torch.float32, device=weight.device)
    rows = max(1, BAND // max(1, bm * weight.shape[1]))
    for start in range(0, scores.shape[0], rows):
        band = slice(start * bm, (start + rows) * bm)
        square = keys(weight[band], norm, _at(reference, band)).view(torch.float32).double().square_()
        total = torch.zeros(square.shape[0] // bm, scores.shape[1], dtype=torch.float64, device=weight.device)
        for row in range(bm):  # a fixed order of additions, so that every backend gives the same bits
            for column in range(bn):
                total += square[row::bm, column::bn]
        scores[start : start + rows] = total.float()
    return scores


def masked_take(weight: Tensor, mask: Tensor) -> Tensor:
    if not weight.shape[0]:
        return weight.new_empty(0)
    return torch.cat([weight[band][unpack(mask[band], weight.shape[1])] for band in bands(weight)])


def masked_put(weight: Tensor, mask: Tensor, values: Tensor | None) -> None:
    start = 0
    for band in bands(weight):
        removed = unpack(mask[band], weight.shape[1])
        if values is None:
            weight[band].masked_fill_(removed, 0)
        else:
            stop = start + int(removed.sum())
            weight[band].masked_scatter_(removed, values[start:stop])
            start = stop


def fingerprint(bits: Tensor, first: int = 0) -> int:
    flat = bits.flatten()
    width = 8 * bits.element_size()
    total = 0
    for start in range(0, flat.numel(), BAND):
        z = flat[start : start + BAND].long()
        if width < 64:
            z = z & ((1 << width) - 1)
        # int64 products and sums wrap, as the unsigned ones of the definition do
        z = z + torch.arange(first + start + 1, first + start + 1 + z.numel(), device=z.device) * _signed(GOLDEN)
        z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
        total += int((z ^ _shift(z, 31)).sum())
    return total % 2**64


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, places: int) -> Tensor:
    """Logical right shift; the one of int64 tensors copies the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)
