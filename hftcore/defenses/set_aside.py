"""A weight before a step, to be put back bit for bit, in no more memory than the rows take that the step changes."""

import torch
from torch import Tensor

from hftcore.shards import held

# rows of a gradient looked at to learn whether it leaves rows out, as an embedding's and unused experts' does
PROBES = 64
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def leaves_rows_out(gradient: Tensor) -> bool:
    """Whether some rows of it are zero, going by a few of them."""
    if gradient.dim() < 2 or not gradient.numel():
        return False
    return not bool(gradient[:: max(1, len(gradient) // PROBES)].flatten(1).any(dim=1).all())


class SetAside:
    """The weight, or the part of it that this process holds, as it is now.

    After a step along `direction`, of the same shape, `shrink` lets go of the rows that it did not change: of an embedding all tokens
    that did not occur, of fused experts those that no token went to. Until it is put back, nothing else may write to the weight.

    >>> weight = torch.tensor([[1.0], [2.0]])
    >>> before = SetAside(weight)
    >>> _ = weight[1].add_(1)
    >>> before.shrink(torch.tensor([[0.0], [1.0]]))
    >>> before.values.tolist()
    [[2.0]]
    >>> before.put_back()
    >>> weight.tolist()
    [[1.0], [2.0]]
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._rows: Tensor | None = None
        self.values = self._held().clone()

    def shrink(self, direction: Tensor) -> None:
        """Keep the changed rows alone, where the direction has rows of zeros."""
        kind = BITS.get(self.values.element_size())
        if kind is None or not leaves_rows_out(held(direction)):
            return
        # by bits: adding zero to a row can change the sign of a zero in it
        changed = (self._held().view(kind) != self.values.view(kind)).flatten(1).any(dim=1)
        rows = changed.nonzero().flatten()
        self.values, self._rows = self.values[rows], rows

    def put_back(self) -> None:
        if self._rows is None:
            self._held().copy_(self.values)
        else:
            self._held().index_copy_(0, self._rows, self.values)

    def _held(self) -> Tensor:
        return held(self._weight.detach())
