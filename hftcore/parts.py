"""The matrices of a comparison group, or what a process holds of them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hftcore.backend import implementation


@dataclass(frozen=True)
class Part:
    """One matrix of the group: [M, N] weight, [N] norm (root of the energy), and the reference of the same shape or None."""

    weight: Tensor
    norm: Tensor
    reference: Tensor | None = None

    def call(self, op: str, *args: object) -> Tensor:
        return implementation(op, self.weight.device)(self.weight, self.norm, self.reference, *args)


@dataclass(frozen=True)
class Place:
    """Where a part lies in the group, whose matrices stand one below the other.

    Fields:
        rows, columns: of the part.
        row: of the group, at which the part begins.
        column: of its matrix, at which the part begins.
        width: columns of its matrix.
        is_counted: False where another process holds the same, and counts it.
    """

    rows: int
    columns: int
    row: int
    column: int
    width: int
    is_counted: bool = True


Maker = Callable[[], Part]
