"""Exact selection on weights that several processes hold together (torch.distributed): the same mask as on one, bit for bit.

Each process keeps its rows, its columns or its experts of a matrix and learns its part of the mask. What travels are counts: a
histogram of 2,048 bins for each pass over a matrix or a model, and for rows cut by columns 31 counts a row; never weights or scores.
A process that dies ends the others with an error, at the latest after the group's timeout, before anything is changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hftcore import checks, ops
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels.reference import FINITE, keys, pack
from hftcore.pattern import Pattern
from hftcore.ranks import AT_ONCE, gather, reduce, together
from hftcore.selection import Part, Threshold, find_threshold, first_ties

Cutting = Literal["rows", "columns", "whole"]

BAND = 1 << 23  # scores in memory at a time; each takes some 13 bytes


@dataclass(frozen=True)
class Shard:
    """What this process holds of one matrix; over the ranks of the group, in their order, the shards make the whole.

    Fields:
        weight: [m, n] float32, bfloat16 or float16; may be empty.
        energy: [n] float32, of these columns.
        cut: "rows": the ranks hold rows one below the other (fused experts too, seen as [E * M, N], whatever their matrices);
            "columns": columns side by side; "whole": each process holds all of it.
        reference: of the shape of `weight`, or None.
    """

    weight: Tensor
    energy: Tensor
    cut: Cutting
    reference: Tensor | None = None

    def part(self) -> Part:
        return Part(self.weight.detach(), checks.norm(self.energy, self.weight), self.reference)


def sharded_mask(shard: Shard, pattern: Pattern | str, group: Any = None) -> Tensor:
    """This process's part of the mask that `hftcore.ops.prune_mask` gives for the whole matrix.

    Args:
        shard: what this process holds.
        pattern: scope "row" or "matrix", or "n:m"; no blocks.
        group: of torch.distributed; None: all processes. Every one of them makes the same call.

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
        group: of torch.distributed; None: all processes. Every one of them makes the same call.

    Returns and raises: as `sharded_mask`, for each shard.
    """
    pattern = Pattern.of(pattern)
    _check(shards, pattern, group)
    if not shards:
        return []
    if pattern.scope == "model":
        return _group_masks(shards, pattern, group)
    if pattern.scope == "matrix":
        return [_group_masks([shard], pattern, group)[0] for shard in shards]
    _refuse_nonfinite(shards, group)
    return [
        ops.prune_mask(shard.weight, shard.energy, pattern, shard.reference)
        if shard.cut != "columns" or pattern.group is not None
        else _mask_of_cut_rows(shard, pattern, group)
        for shard in shards
    ]


def _group_masks(shards: Sequence[Shard], pattern: Pattern, group: Any) -> list[Tensor]:
    """Masks under one threshold: histograms are added up, and ties counted in the order of position."""
    add = partial(reduce, group)
    # what all hold counts once
    counted = [shard for shard in shards if shard.cut != "whole" or dist.get_rank(group) == 0]
    sizes = [(shard.weight.shape[0], shard.weight.shape[1]) for shard in counted]
    total = add(torch.tensor([sum(rows * columns for rows, columns in sizes)]), "sum")
    count, invert = pattern.low_count(int(total))
    found = find_threshold([shard.part for shard in counted], sizes, count, add)
    masks = []
    for shard, quota in zip(shards, _quotas(shards, found, group), strict=True):
        rows, columns = shard.weight.shape
        mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=shard.weight.device)
        shard.part().call("cut", found.key, quota.to(mask.device), invert, mask)
        masks.append(mask)
    return masks


def _quotas(shards: Sequence[Shard], found: Threshold, group: Any) -> Iterator[Tensor]:
    """[rows] of each shard: how many of the ties in each of its rows are among the first `found.need` of all.

    What has to be known of the others, their ties row by row where they hold the same rows, else their sum, travels for many
    shards in one round.
    """
    if found.need in (0, found.ties):
        for shard in shards:
            rows, columns = shard.weight.shape
            yield torch.full((rows,), columns if found.need else 0, dtype=torch.int64)
        return
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    need = found.need
    for few in _by_room(shards, AT_ONCE // ranks):
        ties = [shard.part().call("tie_counts", found.key).cpu() for shard in few]
        told = [own if shard.cut == "columns" else own.sum().view(1) for own, shard in zip(ties, few, strict=True)]
        everyone = gather(torch.cat(told), group).split([len(part) for part in told], dim=1)
        for own, shard, said in zip(ties, few, everyone, strict=True):
            if shard.cut == "columns":
                # row-major order goes through the ranks once in every row
                yield first_ties(said.t().flatten(), need).view(len(own), ranks)[:, rank]
                total = int(said.sum())
            else:
                # every process holds all of what is whole
                ahead, total = (
                    (0, int(said[rank])) if shard.cut == "whole" else (int(said[:rank].sum()), int(said.sum()))
                )
                yield first_ties(own, max(0, need - ahead))
            need = max(0, need - total)


def _by_room(shards: Sequence[Shard], room: int) -> Iterator[list[Shard]]:
    """The shards in turn, so many at a time that what a process tells of them is at most `room` numbers; the same on every process."""
    few: list[Shard] = []
    used = 0
    for shard in shards:
        size = len(shard.weight) if shard.cut == "columns" else 1
        if few and used + size > room:
            yield few
            few, used = [], 0
        few.append(shard)
        used += size
    yield few


def _mask_of_cut_rows(shard: Shard, pattern: Pattern, group: Any) -> Tensor:
    """Scope "row" across columns on several processes: each row's threshold by bisection of its 31 bits, all rows of a band at once."""
    rank = dist.get_rank(group)
    rows, columns = shard.weight.shape
    widths = gather(torch.tensor([columns]), group).flatten()
    count, invert = pattern.low_count(int(widths.sum()))
    norm = checks.norm(shard.energy, shard.weight)
    mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=shard.weight.device)
    step = max(1, BAND // max(1, int(widths.max())))  # the same on every process
    for start in range(0, rows, step):
        band = slice(start, start + step)
        key = keys(shard.weight.detach()[band], norm, None if shard.reference is None else shard.reference[band])
        low = torch.zeros(len(key), dtype=torch.int64)
        high = torch.full_like(low, FINITE - 1)
        for _ in range(31):
            middle = (low + high) // 2
            reached = reduce(group, (key <= middle.to(key.device)[:, None]).sum(1).cpu(), "sum") >= count
            low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
        threshold = low.to(key.device)[:, None]
        below, tie = key < threshold, key == threshold
        ties = gather(tie.sum(1).cpu(), group)
        need = count - reduce(group, below.sum(1).cpu(), "sum") - ties[:rank].sum(0)
        chosen = below | (tie & (tie.cumsum(1) <= need.to(key.device)[:, None]))
        mask[band] = pack(chosen ^ invert)
    return mask


def _check(shards: Sequence[Shard], pattern: Pattern, group: Any) -> None:
    """Refuse on every process what does not fit on one."""
    with together(group):
        if pattern.block is not None:
            raise HftcoreError("block is not there for sharded weights; leave it out, or gather the matrix")
        for shard in shards:
            if shard.cut not in ("rows", "columns", "whole"):
                raise HftcoreError(f"cut must be 'rows', 'columns' or 'whole', got {shard.cut!r}")
            checks.weight(shard.weight, shard.reference)
            checks.norm(shard.energy, shard.weight)
    least, most = _extremes(torch.tensor([len(shards)]), group)
    if least != most:
        raise HftcoreError(
            f"every process must give a shard of each matrix, got {least.item()} to {most.item()} shards"
        )
    if not shards:
        return
    sizes = torch.tensor([shard.weight.shape[shard.cut != "columns"] for shard in shards], dtype=torch.int64)
    for shard, least, most in zip(shards, *_extremes(sizes, group), strict=True):
        if least != most:
            name = "rows" if shard.cut == "columns" else "columns"
            raise HftcoreError(
                f"shards cut by {shard.cut} must have the same number of {name}, got {least.item()} to {most.item()}"
            )
    if pattern.group is not None:
        m = pattern.group[1]
        left = torch.tensor([shard.weight.shape[1] % m for shard in shards], dtype=torch.int64)
        if bool(reduce(group, left, "max").any()):
            raise HftcoreError(f"sparsity {pattern.sparsity!r} needs columns in groups of {m} on every process")


def _extremes(numbers: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The least and the most over all processes, element by element."""
    most = reduce(group, torch.cat([numbers, -numbers]), "max")
    return -most[len(numbers) :], most[: len(numbers)]


def _refuse_nonfinite(shards: Sequence[Shard], group: Any) -> None:
    bad = sum(int(shard.part().call("nonfinite")) for shard in shards)
    if total := int(reduce(group, torch.tensor([bad]), "sum")):
        raise NonFiniteError(
            f"weight has {total} scores that are NaN or infinite, {bad} of them on this process; repair the weights or "
            "calibrate again"
        )
