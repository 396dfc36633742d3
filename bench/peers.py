"""The ways other code prunes, each in a few lines of plain PyTorch written for this suite.

All take `weight` [M, N] and `energy` [N] as `hftcore.ops` does. `in place` ones zero the lowest `count` scores of each group and
return the weight; `removed_` ones return booleans, True = removed. Only the sorts are stable: on equal scores the others may remove
other weights than hftcore does, or (kthvalue) all of the equals.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Way = Callable[..., Tensor]


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


def row_partition(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """numpy.partition of the scores, whose `count`-th of each row is the threshold."""
    import numpy as np

    score = scores(weight, energy)
    threshold = torch.from_numpy(np.partition(score.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())
    return weight.masked_fill_(score <= threshold, 0.0)


def matrix_partition(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """numpy.partition of all scores at once."""
    import numpy as np

    score = scores(weight, energy)
    threshold = float(np.partition(score.numpy(), count - 1, axis=None)[count - 1])
    return weight.masked_fill_(score <= threshold, 0.0)


def matrix_utils_prune(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """The package's own: torch.nn.utils.prune with the scores as importances, made permanent."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    prune.l1_unstructured(layer, "weight", amount=count, importance_scores=scores(weight, energy))
    prune.remove(layer, "weight")
    return weight.copy_(layer.weight)


def row_bisection(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """For torch.compile: 31 counting passes, one bit of the threshold's float32 pattern each; no score is kept."""
    norm = energy.sqrt()
    low = torch.zeros(weight.shape[0], 1, dtype=torch.int32, device=weight.device)
    for bit in range(30, -1, -1):
        probe = low + (1 << bit)
        keys = (weight.abs() * norm).view(torch.int32)
        low = torch.where((keys < probe).sum(dim=1, keepdim=True) < count, probe, low)
    keys = (weight.abs() * norm).view(torch.int32)
    below, ties = keys < low, keys == low
    first = ties.cumsum(dim=1) <= count - below.sum(dim=1, keepdim=True)
    return weight.masked_fill_(below | (ties & first), 0.0)


def blocks_topk(weight: Tensor, energy: Tensor, count: int) -> Tensor:
    """Sums of squared scores over 16 x 16 blocks by reshaping, torch.topk, a broadcast multiplication."""
    rows, columns = weight.shape
    sums = scores(weight, energy).square().view(rows // 16, 16, columns // 16, 16).sum(dim=(1, 3))
    keep = torch.ones(sums.numel(), dtype=weight.dtype, device=weight.device)
    keep[sums.flatten().topk(count, largest=False).indices] = 0
    weight.view(rows // 16, 16, columns // 16, 16).mul_(keep.view(rows // 16, 1, columns // 16, 1))
    return weight


@cache
def _compiled(way: Way) -> Way:
    return torch.compile(way, dynamic=True)


def usable(
    ways: Mapping[str, Way], compiled: Mapping[str, Way], device: torch.device
) -> tuple[dict[str, Way], dict[str, str]]:
    """Those that can run on a device, and why the others cannot.

    Args:
        ways: as they are; names that start with "numpy" run on the CPU only.
        compiled: to be passed through torch.compile, which needs a C++ compiler on the CPU.
    """
    possible, missing = dict(ways), {}
    for name in ways:
        if name.startswith("numpy") and device.type != "cpu":
            missing[name] = "numpy works on the CPU only"
            del possible[name]
    for name, way in compiled.items():
        if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            missing[name] = "torch.compile needs a C++ compiler on the CPU, and there is none"
        else:
            possible[name] = _compiled(way)
    return possible, missing
