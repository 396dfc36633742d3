"""Fingerprints: telling the right tensor from a wrong or changed one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hftcore import checks
from hftcore.backend import implementation
from hftcore.errors import HftcoreError

_WIDE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """A 64-bit fingerprint of a tensor's dtype, shape and every bit; the same on every backend and device.

    Not cryptographic: it tells a wrong or changed tensor from the right one, not an adversary's.

    Raises:
        HftcoreError: no dense tensor, or elements of more than 8 bytes.

    >>> fingerprint(torch.zeros(2, 2)) == fingerprint(torch.zeros(4))
    False
    """
    checks.dense("tensor", tensor)
    if tensor.element_size() not in _WIDE:
        raise HftcoreError(
            f"tensor must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}; take torch.view_as_real of it"
        )
    bits = tensor.detach().contiguous()
    bits = bits.view(_WIDE[bits.element_size()])
    return fingerprint_text(tensor.dtype, tensor.shape, implementation("fingerprint", tensor.device)(bits))


def fingerprint_text(dtype: torch.dtype, shape: Sequence[int], total: int) -> str:
    """The fingerprint of a whole tensor from the sum, modulo 2**64, of the `fingerprint_sum` of its parts.

    >>> parts = [fingerprint_sum(torch.ones(2), 0), fingerprint_sum(torch.ones(3), 2)]
    >>> fingerprint_text(torch.float32, (5,), sum(parts)) == fingerprint(torch.ones(5))
    True
    """
    size = "x".join(map(str, shape))
    return f"{str(dtype).removeprefix('torch.')}[{size}]:{total % 2**64:016x}"


def fingerprint_total(text: str) -> int:
    """The sum in a fingerprint; `fingerprint_text` puts it back."""
    return int(text.rpartition(":")[2], 16)


def fingerprint_sum(part: Tensor, first: int) -> int:
    """What the elements of `part`, contiguous and of number `first` and on in a larger tensor, add to its fingerprint."""
    bits = part.detach().view(_WIDE[part.element_size()])
    return implementation("fingerprint", part.device)(bits, first)
