"""The ways other code prunes, each in a few lines of plain PyTorch written for this suite.

All take `weight` [M, N] and `energy` [N] as `hftcore.ops` does. `in place` ones zero the lowest `count` scores of each group and
return the weight; `removed_` ones return booleans, True = removed. Only the sorts are stable: on equal scores the others may remove
other weights than hftcore does, or (kthvalue) all of the equals.
"""

import torch
from torch import Tensor


def scores(weight: Tensor, energy: Tensor) -> Tensor:
    """[M, N] float32: the score matrix they all build."""
    return weight.abs() * energy.sqrt().reshape(1, -1)


def removed_by_row_sort(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """The way of Wanda's and Antidote's published code: stable sort of every row, scatter into a mask."""
    score = scores(weight, energy)
    removed = torch.zeros_like(score, dtype=torch.bool)
    order = score.sort(dim=-1, stable=True).indices
    return removed.scatter_(1, order[:, :count], True)


def row_sort(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """`removed_by_row_sort`, then the masked zero."""
    weight[removed_by_row_sort(weight, energy, count)] = 0
    return weight


def row_topk(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """torch.topk of every row, scatter of zeros."""
    order = scores(weight, energy).topk(count, dim=-1, largest=False, sorted=False).indices
    return weight.scatter_(1, order, 0.0)


def row_kthvalue(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """torch.kthvalue of every row as its threshold."""
    score = scores(weight, energy)
    return weight.masked_fill_(score <= score.kthvalue(count, dim=-1, keepdim=True).values, 0.0)


def removed_by_row_topk(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """torch.topk of every row, scatter into a mask."""
    score = scores(weight, energy)
    order = score.topk(count, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def matrix_kthvalue(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """torch.kthvalue of the flattened matrix as the threshold."""
    score = scores(weight, energy)
    return weight.masked_fill_(score <= score.flatten().kthvalue(count).values, 0.0)


def groups_of_four_loop(weight: Tensor, energy: Tensor) -> Tensor:
    """2:4 the way of Wanda's code: a Python loop over every four columns."""
    score = scores(weight, energy)
    removed = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], 4):
        order = score[:, start : start + 4].topk(2, dim=1, largest=False).indices
        removed.scatter_(1, order + start, True)
    weight[removed] = 0
    return weight


def groups_of_four_topk(weight: Tensor, energy: Tensor) -> Tensor:
    """2:4 by one torch.topk over all groups."""
    score = scores(weight, energy).view(-1, 4)
    order = score.topk(2, dim=1, largest=False, sorted=False).indices
    weight.view(-1, 4).scatter_(1, order, 0.0)
    return weight


def energy_square_sum(x: Tensor) -> Tensor:
    """A float32 copy, squared and summed."""
    return x.float().square().sum(dim=0)


def energy_norm(x: Tensor) -> Tensor:
    """The way of Wanda's code: norms of the rows of the transposed float32 copy, squared."""
    return torch.linalg.vector_norm(x.float().t(), dim=1).square()
