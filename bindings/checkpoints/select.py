"""Which weights of a checkpoint's pieces a pattern removes, block by block, with the same bits as in memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore import checks, ops
from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.bindings.checkpoints.threshold import Source, find_shares
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.parts import Part
from hftcore.pattern import Pattern
from hftcore.selection import Threshold, find_threshold, first_ties


class Selection:
    """The choice of a pattern among the pieces of a model.

    Args:
        sources: the pieces that take part, in position order.
        pattern: what to remove.
        folder: for what memory should not hold, while the choice is made.
        plan: that of the same call, if it is known from an earlier run.

    Raises:
        HftcoreError: the pattern does not fit a piece; `NonFiniteError` naming the first bad weight.
    """

    def __init__(
        self, sources: Sequence[Source], pattern: Pattern, folder: Path, plan: Mapping[str, Any] | None = None
    ) -> None:
        self.pattern, self._folder = pattern, folder
        self._sources = {_key(source.piece): source for source in sources}
        self._check()
        self.plan: dict[str, list[int]] = dict(plan) if plan is not None else self._planned()
        self._current: tuple[str, Any] = "", None

    def measured(self, sources: Sequence[Source]) -> None:
        """Take the energies of sources that were given before as if they were known; only for scope "row"."""
        self._sources |= {_key(source.piece): source for source in sources}

    def changed(self, piece: Piece) -> int:
        """How many weights of a piece are removed."""
        rows, columns = piece.rows, piece.columns
        if _key(piece) not in self._sources:
            return 0
        if _key(piece) in self.plan:
            low = self.plan[_key(piece)][3]
            return rows * columns - low if self.pattern.invert else low
        if self.pattern.block is not None:
            bm, bn = self.pattern.block
            across, down = columns // bn, rows // bm
            matrix = self.pattern.scope == "matrix"
            return bm * bn * (self.pattern.removed(across * down) if matrix else down * self.pattern.removed(across))
        if self.pattern.group is not None:
            m = self.pattern.group[1]
            return rows * (columns // m) * self.pattern.removed(m)
        if self.pattern.scope == "matrix":
            return self.pattern.removed(rows * columns)
        return rows * self.pattern.removed(columns)

    def mask(self, piece: Piece, row: int, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """(packed mask, reference's rows) of a block of a piece; blocks are asked for in order, from row 0 on.

        Args:
            piece: one of the model's.
            row: the number of the block's first row.
            block: [rows, columns] weights.
        """
        rows = slice(row, row + block.shape[0])
        source = self._sources.get(_key(piece))
        if source is None:
            return torch.zeros(block.shape[0], -(-block.shape[1] // 8), dtype=torch.uint8), None
        other = source.other(rows)
        if row == 0:
            self._current = _key(piece), self._begin(source)
        state = self._current[1]
        if isinstance(state, Tensor):
            return state[rows], other
        if state is None:
            try:
                return ops.prune_mask(block, source.energy, self.pattern, other), other
            except NonFiniteError:
                raise self._named(source) from None
        mask = torch.zeros(block.shape[0], -(-block.shape[1] // 8), dtype=torch.uint8)
        part = Part(block, checks.norm(source.energy, block), other)
        if state.need in (0, state.ties):
            quota = torch.full((block.shape[0],), block.shape[1] if state.need else 0, dtype=torch.int64)
        else:
            quota = first_ties(part.call("tie_counts", state.key), state.need)
            self._current = _key(piece), Threshold(state.key, state.need - int(quota.sum()), state.ties)
        part.call("cut", state.key, quota, self.pattern.invert, mask)
        return mask, other

    def _begin(self, source: Source) -> Tensor | Threshold | None:
        """What the blocks of a piece share: its whole mask, its threshold, or nothing where every row stands for itself."""
        if planned := self.plan.get(_key(source.piece)):
            return Threshold(*planned[:3])
        if self.pattern.scope != "matrix":
            return None
        if self.pattern.block is not None:
            part = source.part()
            return ops.prune_mask(part.weight, source.energy, self.pattern, part.reference)
        size = source.piece.rows, source.piece.columns
        with self._naming([source]):
            return find_threshold([source.part], [size], self._low_count([source]))

    def _planned(self) -> dict[str, list[int]]:
        """Thresholds of the groups that span pieces: piece -> [key, ties that go with the low set, ties, size of the low set]."""
        if self.pattern.scope == "row":
            return {}
        groups: dict[tuple[str, int], list[Source]] = {}
        for source in self._sources.values():
            name = (source.piece.parameter, source.piece.expert) if self.pattern.scope == "matrix" else ("", 0)
            groups.setdefault(name, []).append(source)
        plan = {}
        for group in groups.values():
            if len(group) == 1 and self.pattern.scope == "matrix":
                continue  # found when its turn comes, so that it is read once
            if self.pattern.block is not None:
                raise HftcoreError(
                    f"{group[0].piece.parameter}: blocks compared across a matrix that is stored in {len(group)} tensors; "
                    "use scope 'row', or prune the model in memory"
                )
            count = self._low_count(group)
            with self._naming(group):
                found = find_shares(group, count, self._folder)
            need = count - sum(found.below)
            for source, below, ties in zip(group, found.below, found.ties, strict=True):
                mine = min(need, ties)
                need -= mine
                plan[_key(source.piece)] = [found.key, mine, ties, below + mine]
        return plan

    def _low_count(self, group: Sequence[Source]) -> int:
        """How many weights of a group are in its low set."""
        return self.pattern.low_count(sum(source.piece.rows * source.piece.columns for source in group))[0]

    @contextmanager
    def _naming(self, group: Sequence[Source]) -> Iterator[None]:
        """Let an error about a bad weight say which one it is."""
        try:
            yield
        except NonFiniteError:
            for source in group:
                if source.part().call("nonfinite"):
                    raise self._named(source) from None
            raise

    def _named(self, source: Source) -> NonFiniteError:
        """The error that names the first bad weight of a piece by its place in the parameter."""
        part = source.part()
        try:
            ops.prune_mask(part.weight, source.energy, Pattern(0.0), part.reference)
        except NonFiniteError as error:
            return NonFiniteError(f"{source.piece.stored}: {error}")
        return NonFiniteError(f"{source.piece.stored} changed while it was read; run again")

    def _check(self) -> None:
        for source in self._sources.values():
            piece = source.piece
            where = f"{piece.parameter}: "
            if self.pattern.group is not None and piece.columns % self.pattern.group[1]:
                raise HftcoreError(
                    f"{where}sparsity {self.pattern.sparsity!r} needs columns in groups of {self.pattern.group[1]}, "
                    f"weight has {piece.columns}"
                )
            if self.pattern.block is None:
                continue
            bm, bn = self.pattern.block
            if piece.rows % bm or piece.columns % bn:
                raise HftcoreError(
                    f"{where}block {self.pattern.block} does not divide weight of shape ({piece.rows}, {piece.columns}); "
                    "choose sizes that do"
                )


def _key(piece: Piece) -> str:
    return f"{piece.parameter}:{piece.first}"
