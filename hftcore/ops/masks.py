"""Packed masks: one bit a weight, and what they take out of a weight or put into it."""

import torch
from torch import Tensor

from hftcore import checks
from hftcore.backend import implementation
from hftcore.errors import HftcoreError
from hftcore.kernels import reference as meaning


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """Packed bits as booleans.

    Args:
        mask: [M, ceil(columns / 8)] uint8, as `prune_mask` gives.
        columns: N of the weight.

    Returns:
        [M, columns] bool, True = removed.

    Raises:
        HftcoreError: a mask of another width.

    >>> unpack_mask(torch.tensor([[5]], dtype=torch.uint8), 3)
    tensor([[ True, False,  True]])
    """
    if mask.dim() != 2 or mask.dtype != torch.uint8 or mask.shape[1] != -(-columns // 8):
        raise HftcoreError(
            f"mask must be uint8 [M, {-(-columns // 8)}] (one bit for each of {columns} columns), got {mask.dtype} {tuple(mask.shape)}"
        )
    return meaning.unpack(mask, columns)


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans [M, N] as packed bits [M, ceil(N / 8)] uint8; the inverse of `unpack_mask`.

    Raises:
        HftcoreError: not a boolean matrix.

    >>> pack_mask(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.uint8)
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise HftcoreError(f"mask must be bool [M, N], got {mask.dtype} {tuple(mask.shape)}")
    return meaning.pack(mask)


def masked_take(weight: Tensor, mask: Tensor) -> Tensor:
    """The weights a packed mask marks, in row-major order: [R], dtype of weight.

    Raises:
        HftcoreError: the mask does not fit the weight.

    >>> masked_take(torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([[5]], dtype=torch.uint8))
    tensor([3., 1.])
    """
    _fits(weight, mask)
    return implementation("masked_take", weight.device)(weight.detach(), mask.contiguous())


def masked_put_(weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Tensor:
    """Write `values` ([R], row-major order; None: zeros) where a packed mask marks, in place; returns `weight`.

    Raises:
        HftcoreError: the mask does not fit, or the number or dtype of the values differs.

    >>> masked_put_(torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([[5]], dtype=torch.uint8))
    tensor([[ 0., -4.,  0.]])
    """
    _fits(weight, mask)
    if values is not None:
        marked = count_mask(mask)
        if values.shape != (marked,) or values.dtype != weight.dtype:
            raise HftcoreError(
                f"values must be {weight.dtype} of shape ({marked},) (one for each marked weight), got {values.dtype} {tuple(values.shape)}"
            )
        checks.same_device("values", values, weight)
    implementation("masked_put", weight.device)(weight.detach(), mask.contiguous(), values)
    return weight


def count_mask(mask: Tensor) -> int:
    """How many weights a packed mask marks.

    >>> count_mask(torch.tensor([[5, 255]], dtype=torch.uint8))
    10
    """
    bits = mask - ((mask >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return int(((bits + (bits >> 4)) & 0x0F).sum())


def _fits(weight: Tensor, mask: Tensor) -> None:
    checks.weight(weight, None)
    checks.dense("mask", mask)
    if mask.dtype != torch.uint8 or mask.shape != (weight.shape[0], -(-weight.shape[1] // 8)):
        raise HftcoreError(
            f"mask must be uint8 of shape ({weight.shape[0]}, {-(-weight.shape[1] // 8)}) for weight {tuple(weight.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    checks.same_device("mask", mask, weight)
