"""Fingerprints: telling the right tensor from a wrong or changed one."""

import torch
from torch import Tensor

from hftcore.backend import implementation


def fingerprint(tensor: Tensor) -> str:
    """A 64-bit fingerprint of a tensor's dtype, shape and every bit; the same on every backend and device.

    Not cryptographic: it tells a wrong or changed tensor from the right one, not an adversary's.

    >>> fingerprint(torch.zeros(2, 2)) == fingerprint(torch.zeros(4))
    False
    """
    bits = tensor.detach().contiguous()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    shape = "x".join(map(str, tensor.shape))
    return (
        f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{implementation('fingerprint', tensor.device)(bits):016x}"
    )
