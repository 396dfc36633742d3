"""Per-sample gradient norms by the native library; what the library has not (float64) is `gradients.py`'s.

The ghost form multiplies up to the diagonal alone and keeps no T x T matrix. The direct form takes 0.42 to 0.7 of the time of PyTorch's
product g^T x where the processor has AVX-512 but PyTorch's products make half use of it (AMD Zen 5), with AVX2 1.0 to 1.2 of it; the
gradient beside the norms costs hardly more, so that a model's own gradients come from here too.
"""

import torch
from torch import Tensor

from hftcore.kernels import native

FEW = 16  # tokens of a sample: below, adding its share to the gradient's tile costs more than the product
# features of an input, at least, and outputs to one of them, at most, whose gradient is faster here than PyTorch's product
LEAST, TALL = 512, 4

direct = native.direct
direct_with_gradient = native.direct_with_gradient
ghost = native.ghost
lower_gram = native.lower_gram
serves = native.multiplies


def is_ghost(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    return T * (M + (0 if has_gram else N)) < 2 * M * N


def is_direct_with_gradient(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    return T >= FEW


def is_input_gradient(g: Tensor, weight: Tensor) -> bool:
    M, N = weight.shape
    return LEAST <= N >= M / TALL and g.dtype == weight.dtype == torch.float32 and native.simd().startswith("avx512")


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """As that of `gradients.py`; the same bits whatever the thread count."""
    # the sum over output features is one over "tokens" of a single sample
    rows = g.reshape(1, -1, g.shape[-1])
    return native.direct_with_gradient(weight[None], rows.mT)[1].view(*g.shape[:-1], weight.shape[1])


def grad_norms_sq(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    if is_ghost(x.shape[1], g.shape[2], x.shape[2], gram is not None):
        return ghost(x, g, gram)
    return direct(x, g)
