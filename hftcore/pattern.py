"""What to remove: how much, compared with what, from which end."""

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from hftcore.errors import HftcoreError

Scope = Literal["row", "matrix", "model"]
Remove = Literal["lowest", "highest"]

_GROUPS = re.compile(r"(\d+):(\d+)")
_TEXT = re.compile(r"(\S+)(?:\s+(row|matrix|model))?(?:\s+(lowest|highest))?(?:\s+(\d+)x(\d+))?")


@dataclass(frozen=True)
class Pattern:
    """How much is removed, in which comparison group, from which end.

    Weights are ordered by (score, position) ascending inside their group; position is the column in a row, the row-major index in a
    matrix, (sorted tensor name, row-major index) in a model.

    Args:
        sparsity: the share removed, "50%" or 0.5, in [0, 1]; or "n:m", n of every m consecutive columns ("2:4").
        scope: the comparison group: "row" (Wanda's and Antidote's code), "matrix" or "model".
        remove: "lowest" takes the first int(size * sparsity) of each group, as Wanda does; "highest" takes the last
            size - int(size * (1 - sparsity)), as Antidote does. Both products are in double precision.
        block: (rows, columns): whole blocks are removed, compared by the sum of their squared scores, in the row of blocks
            (scope "row") or in the matrix. The matrix must divide into blocks.

    Raises:
        HftcoreError: a share outside [0, 1], "3:2", an unknown scope or end, a block with "n:m" or scope "model".

    >>> Pattern("10%", remove="highest").low_count(256)
    (230, True)
    >>> str(Pattern("2:4"))
    '2:4 row lowest'
    """

    sparsity: str | float
    scope: Scope = "row"
    remove: Remove = "lowest"
    block: tuple[int, int] | None = None
    ratio: float = field(init=False, repr=False, compare=False, default=0.0)
    group: tuple[int, int] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        ratio, group = _parse(self.sparsity)
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "group", group)
        if self.scope not in ("row", "matrix", "model"):
            raise HftcoreError(f"scope must be 'row', 'matrix' or 'model', got {self.scope!r}")
        if self.remove not in ("lowest", "highest"):
            raise HftcoreError(f"remove must be 'lowest' or 'highest', got {self.remove!r}")
        if group is not None and (self.scope != "row" or self.block is not None):
            raise HftcoreError(
                f"sparsity {self.sparsity!r} compares inside groups of {group[1]}: leave scope and block out"
            )
        if self.block is not None:
            sizes = self.block if isinstance(self.block, (tuple, list)) else ()
            if len(sizes) != 2 or not all(type(size) is int and size >= 1 for size in sizes):
                raise HftcoreError(f"block must be two positive integers (rows, columns), got {self.block!r}")
            object.__setattr__(self, "block", tuple(sizes))
            if self.scope == "model":
                raise HftcoreError("block needs scope 'row' (rows of blocks) or 'matrix', got 'model'")

    @property
    def invert(self) -> bool:
        """True when all but the low set is removed."""
        return self.remove == "highest"

    def low_count(self, size: int) -> tuple[int, bool]:
        """(count, invert) for a group of `size`: the lowest `count` are removed or, with `invert`, all but them."""
        if self.group is not None:
            n, m = self.group
            return (m - n if self.invert else n), self.invert
        return int(size * (1 - self.ratio if self.invert else self.ratio)), self.invert

    def removed(self, size: int) -> int:
        """How many of a group of `size` are removed."""
        count, invert = self.low_count(size)
        return size - count if invert else count

    def __str__(self) -> str:
        size = f" {self.block[0]}x{self.block[1]}" if self.block else ""
        amount = self.sparsity if self.group else repr(self.ratio)
        return f"{amount} {self.scope} {self.remove}{size}"

    @classmethod
    def of(cls, pattern: "Pattern | str") -> "Pattern":
        """A pattern as it is, or from its text.

        Raises:
            HftcoreError: neither of them, or a text that is not of that form.
        """
        if isinstance(pattern, cls):
            return pattern
        if not isinstance(pattern, str):
            raise HftcoreError(f'pattern must be a Pattern or its text such as "50%", got {pattern!r}')
        return cls.parse(pattern)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern that `str` wrote; scope and end may be left out.

        Raises:
            HftcoreError: the text is not of that form.

        >>> Pattern.parse("0.1 matrix lowest 16x16") == Pattern(0.1, scope="matrix", block=(16, 16))
        True
        """
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise HftcoreError(f'pattern must look like "50%", "2:4" or "0.1 matrix highest 16x16", got {text!r}')
        scope: Any
        remove: Any
        amount, scope, remove, rows, columns = found.groups()
        block = (int(rows), int(columns)) if rows else None
        is_number = ":" not in amount and not amount.endswith("%")
        sparsity = _parse(amount)[0] if is_number else amount
        return cls(sparsity, scope or "row", remove or "lowest", block)


def _parse(sparsity: str | float) -> tuple[float, tuple[int, int] | None]:
    wanted = 'a share in [0, 1] such as 0.5 or "50%", or "n:m" such as "2:4"'
    if isinstance(sparsity, str):
        text = sparsity.strip()
        if groups := _GROUPS.fullmatch(text):
            n, m = int(groups[1]), int(groups[2])
            if not (0 <= n <= m and 2 <= m <= 64):
                raise HftcoreError(
                    f"sparsity {sparsity!r}: n:m removes n of every m columns, so 0 <= n <= m and 2 <= m <= 64"
                )
            return n / m, (n, m)
        try:
            # decimal, so that "33.3%" is the double nearest to 0.333
            ratio = float(Decimal(text[:-1]) / 100 if text.endswith("%") else Decimal(text))
        except InvalidOperation:
            raise HftcoreError(f"sparsity must be {wanted}, got {sparsity!r}") from None
    elif isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool):
        ratio = float(sparsity)
    else:
        raise HftcoreError(f"sparsity must be {wanted}, got {sparsity!r}")
    if not (math.isfinite(ratio) and 0 <= ratio <= 1):
        raise HftcoreError(f"sparsity must be {wanted}, got {sparsity!r}")
    return ratio, None
