"""Input energies: the sum of squares of each feature over tokens."""

import torch
from torch import Tensor

from hftcore import checks
from hftcore.backend import implementation
from hftcore.errors import HftcoreError

_compiling = torch.compiler.is_compiling


def column_energy(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of the squared value of each input feature.

    Args:
        x: [..., N] float32, bfloat16 or float16 activations; all leading axes are tokens.
        mask: bool of the leading shape; True counts. None counts every token.

    Returns:
        [N] float32 on the device of `x` (a sum, neither a mean nor a root). The same input gives the same bits on one backend,
        whatever the number of threads.

    Raises:
        HftcoreError: another dtype, or a mask of another shape.

    Source: the statistic of Sun et al. 2023 (arXiv:2306.11695), eq. 1, before the root and without dividing by the samples.

    >>> column_energy(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    tensor([25.,  2.])
    """
    if _compiling():
        return torch.ops.hftcore.column_energy(x, mask)
    checks.dense("x", x)
    if x.dtype not in checks.FLOATS or x.dim() == 0:
        raise HftcoreError(f"x must be [..., N] float32, bfloat16 or float16, got {x.dtype} {tuple(x.shape)}")
    if mask is not None:
        if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
            raise HftcoreError(
                f"mask must be bool of shape {tuple(x.shape[:-1])} (x without its last axis), got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask.reshape(-1)
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return implementation("column_energy", x.device)(x.detach(), mask)
