"""Exact selection on weights that several processes hold together (torch.distributed): the same mask as on one, bit for bit.

Each process keeps its rows, its columns or its experts of a matrix and learns its part of the mask. What travels are counts, a
histogram of 2,048 bins a round for each matrix or model, and the scores next to the threshold; never weights.
A process that dies ends the others with an error, at the latest after the group's timeout, before anything is changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hftcore import checks, ops
from hftcore.cut_rows import Columns, row_cuts
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.parts import Part, Place
from hftcore.pattern import Pattern
from hftcore.ranks import gather, rank_in, side_by_side, size_of, together
from hftcore.selection import search_cut

ROWS = 1 << 14  # that are cut by columns and share their rounds; each takes 1 to 4 KB of memory
SIDE_BY_SIDE = 64  # matrices whose rounds are shared; each has up to 3 MB of keys in memory


@dataclass(frozen=True)
class Shard:
    """What this process holds of one matrix: some of its rows and columns, all of them, or nothing.

    Fields:
        weight: [m, n] float32, bfloat16 or float16; may be empty.
        energy: [n] float32, of these columns.
        whole: (M, N), the shape of the whole matrix. The shards of all processes lie side by side in it and fill it; their weights are
            counted, but that they do not overlap is checked only where scope "row" meets rows that are cut.
        row, column: where in it the first weight lies.
        reference: of the shape of `weight`, or None.
        is_counted: False where another process gives the same part and this one repeats it.
    """

    weight: Tensor
    energy: Tensor
    whole: tuple[int, int]
    row: int = 0
    column: int = 0
    reference: Tensor | None = None
    is_counted: bool = True

    def part(self) -> Part:
        return Part(self.weight.detach(), checks.norm(self.energy, self.weight), self.reference)

    def empty_mask(self) -> Tensor:
        """The mask that removes nothing."""
        rows, columns = self.weight.shape
        return torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=self.weight.device)


def sharded_mask(shard: Shard, pattern: Pattern | str, group: Any = None) -> Tensor:
    """This process's part of the mask that `hftcore.ops.prune_mask` gives for the whole matrix.

    Args:
        shard: what this process holds.
        pattern: scope "row" or "matrix", or "n:m"; no blocks.
        group: of torch.distributed, or a tuple of those of a device mesh's dimensions: the processes that hold the matrix together, for
            scope "row" those that hold the same rows of it; None: all processes. Every one of them makes the same call.

    Returns:
        [m, ceil(n / 8)] uint8, 1 = removed. The weights are not changed.

    Raises:
        HftcoreError: shards that do not fit the pattern or each other; `NonFiniteError` if a score is NaN or infinite. On every process.
    """
    pattern = Pattern.of(pattern)
    if pattern.scope == "model":
        raise HftcoreError('scope "model" compares the weights of all matrices: call sharded_masks with all shards')
    return sharded_masks([shard], pattern, group)[0]


def sharded_masks(shards: Sequence[Shard], pattern: Pattern | str, group: Any = None) -> list[Tensor]:
    """This process's parts of the masks of several matrices, in fewer rounds than one call of `sharded_mask` for each.

    Args:
        shards: what this process holds of each matrix, sorted by tensor name, the same matrices on every process; where a process
            holds nothing of one, an empty shard stands for it.
        pattern: as for `sharded_mask`, or of scope "model", which compares the weights of all matrices.
        group: as for `sharded_mask`.

    Returns and raises: as `sharded_mask`, for each shard.
    """
    pattern = Pattern.of(pattern)
    group = dist.group.WORLD if group is None else group
    if pattern.scope == "row":
        return _row_masks(shards, pattern, group)
    with together(group) as word:
        _check(shards, pattern, word.same)
        for shard in shards:
            if not shard.is_counted:  # the search does not look at it
                _refuse_nonfinite(shard)
    if pattern.scope == "model":
        return _masks_of_groups([shards] if shards else [], pattern, group)
    masks = []
    for start in range(0, len(shards), SIDE_BY_SIDE):
        masks += _masks_of_groups([[shard] for shard in shards[start : start + SIDE_BY_SIDE]], pattern, group)
    return masks


def _check(shards: Sequence[Shard], pattern: Pattern, same: list[Any]) -> None:
    """Refuse what does not fit, and tell what must be the same on all processes."""
    same += [str(pattern), *(tuple(shard.whole) for shard in shards)]
    if pattern.block is not None:
        raise HftcoreError("block is not there for sharded weights; leave it out, or gather the matrix")
    for shard in shards:
        checks.weight(shard.weight, shard.reference)
        checks.norm(shard.energy, shard.weight)
        ends = shard.row + shard.weight.shape[0], shard.column + shard.weight.shape[1]
        if min(shard.row, shard.column) < 0 or ends[0] > shard.whole[0] or ends[1] > shard.whole[1]:
            raise HftcoreError(
                f"weight of shape {tuple(shard.weight.shape)} at row {shard.row}, column {shard.column} must lie in the whole, "
                f"{tuple(shard.whole)}"
            )
        if pattern.group is not None and (shard.weight.shape[1] % pattern.group[1] or shard.column % pattern.group[1]):
            raise HftcoreError(
                f"sparsity {pattern.sparsity!r} needs columns in groups of {pattern.group[1]} on every process, "
                f"got {shard.weight.shape[1]} from column {shard.column} on"
            )


def _refuse_nonfinite(shard: Shard) -> None:
    if bad := shard.part().call("nonfinite"):
        raise NonFiniteError(
            f"weight has {int(bad)} scores that are NaN or infinite; repair the weights or calibrate again"
        )


def _masks_of_groups(groups: Sequence[Sequence[Shard]], pattern: Pattern, group: Any) -> list[Tensor]:
    """The masks of all shards; those of one group have one threshold, and all groups search in the same rounds."""
    searches, inverts = [], []
    for shards in groups:
        places, rows = [], 0
        for shard in shards:
            size = shard.weight.shape
            places.append(
                Place(size[0], size[1], rows + shard.row, shard.column, shard.whole[1], is_counted=shard.is_counted)
            )
            rows += shard.whole[0]
        total = sum(shard.whole[0] * shard.whole[1] for shard in shards)
        count, invert = pattern.low_count(total)
        parts = [shard.part for shard in shards]
        searches.append(search_cut(parts, places, count, total, rows, rank_in(group), size_of(group)))
        inverts.append(invert)
    masks = []
    for shards, cut, invert in zip(groups, side_by_side(searches, group), inverts, strict=True):
        for shard, quota in zip(shards, cut.quotas, strict=True):
            masks.append(shard.empty_mask())
            shard.part().call("cut", cut.key, quota.to(shard.weight.device), invert, masks[-1])
    return masks


def _row_masks(shards: Sequence[Shard], pattern: Pattern, group: Any) -> list[Tensor]:
    """Rows that lie here whole, and n:m, need nothing of the others but their word that nothing is wrong, which goes round once."""
    masks = []
    with together(group) as word:
        _check(shards, pattern, word.same)
        for shard in shards:
            if pattern.group is not None or shard.weight.shape[1] == shard.whole[1]:
                masks.append(ops.prune_mask(shard.weight, shard.energy, pattern, shard.reference))
                continue
            word.is_any = True
            masks.append(shard.empty_mask())
            _refuse_nonfinite(shard)
    if not word.is_any:
        return masks
    facts = [[*shard.weight.shape, shard.row, shard.column, shard.is_counted] for shard in shards]
    bands: list[_Band] = []
    for shard, mask, held in zip(shards, masks, gather(torch.tensor(facts), group).unbind(1), strict=True):
        if bool((held[:, 1] < shard.whole[1]).logical_and(held[:, 1] > 0).any()):
            bands += _bands(shard.part(), _columns(shard, held), mask)
    for some in _at_once(bands):
        searches, inverts = [], []
        for part, columns, _ in some:
            count, invert = pattern.low_count(sum(columns.widths))
            searches.append(row_cuts(part, columns, count))
            inverts.append(invert)
        for (part, _, mask), (key, quota), invert in zip(some, side_by_side(searches, group), inverts, strict=True):
            part.call("row_cut", key.to(mask.device), quota.to(mask.device), invert, mask)
    return masks


_Band = tuple[Part, Columns, Tensor]  # some rows that are cut, how they are, and their mask


def _bands(part: Part, columns: Columns, mask: Tensor) -> Iterator[_Band]:
    for start in range(0, len(mask), ROWS):
        rows = slice(start, start + ROWS)
        reference = None if part.reference is None else part.reference[rows]
        yield Part(part.weight[rows], part.norm, reference), columns, mask[rows]


def _at_once(bands: Sequence[_Band]) -> Iterator[list[_Band]]:
    """Neighbours of at most `ROWS` rows together."""
    some: list[_Band] = []
    for band in bands:
        if some and sum(len(mask) for *_, mask in [*some, band]) > ROWS:
            yield some
            some = []
        some.append(band)
    if some:
        yield some


def _columns(shard: Shard, held: Tensor) -> Columns:
    """How the rows of a matrix are cut.

    Args:
        held: [processes, 5], of each its rows, columns, first row, first column, and whether they count.
    """
    holding = held[(held[:, 4] == 1) & (held[:, 1] > 0)]
    holding = holding[holding[:, 3].argsort()]
    ends = holding[:, 1].cumsum(0)
    fills = int(holding[:, 1].sum()) == shard.whole[1] and torch.equal(holding[:, 3], ends - holding[:, 1])
    if len(held[:, [0, 2]].unique(dim=0)) > 1 or not fills:
        raise HftcoreError(
            "rows that are cut by columns must lie on the processes of the group, the same rows on each and side by side, got "
            f"(rows, columns, first row, first column, is counted) {held.tolist()} of {tuple(shard.whole)}"
        )
    return Columns(
        widths=holding[:, 1].tolist(),
        place=int((holding[:, 3] < shard.column).sum()),
        is_counted=shard.is_counted and shard.weight.shape[1] > 0,
    )
