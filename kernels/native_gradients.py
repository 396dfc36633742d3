"""The ghost form of `gradients.py` by the native library, for float32 on a CPU; what the library has not is PyTorch's.

It multiplies up to the diagonal alone and keeps no T x T matrix, so it is taken where the plain form would not be: at T = 128 and
widths 512 and 1376 it takes 0.31 to 0.40 of the plain form's time with AVX-512, 0.53 to 0.63 with AVX2.
"""

from torch import Tensor, float32

from hftcore.kernels import gradients, native

# operations a second, of those of PyTorch's products. A wrong guess costs time only; where these have AVX-512 too it is nearer to 1
SPEED = {"avx512": 1.5, "avx2": 1.0}

ghost = native.ghost
lower_gram = native.lower_gram


def serves(*tensors: Tensor) -> bool:
    """Whether the library takes these and is faster than PyTorch here."""
    return all(tensor.dtype == float32 for tensor in tensors) and native.simd() in SPEED


def is_ghost(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    return gradients.is_ghost(T, M, N, has_gram, _ghost_cost)


def is_direct_with_gradient(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    return gradients.is_direct_with_gradient(T, M, N, has_gram, _ghost_cost)


def _ghost_cost(T: int, M: int, N: int) -> float:
    return T * T * (M + N) / SPEED[native.simd()]


def grad_norms_sq(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    if is_ghost(x.shape[1], g.shape[2], x.shape[2], gram is not None):
        return ghost(x, g, gram)
    return gradients.direct(x, g)
