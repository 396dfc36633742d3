"""Per-sample gradient norms of a matrix, from the inputs it multiplied and the gradients of its outputs."""

import importlib
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from hftcore.backend import backend_for, device_of
from hftcore.checks import dense
from hftcore.errors import HftcoreError
from hftcore.kernels import gradients

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def grad_norms_sq(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    """Squared Frobenius norm of each sample's gradient g^T x of a weight that multiplies x.

    The form that takes less time is used: <x x^T, g g^T>, symmetric, for T up to about 2 M N / (M + N), else g^T x itself. Products and
    sums are float32 for every dtype (float64 for float64). Tokens whose gradient is zero, as padding has, add nothing.

    Args:
        x: [B, T, N] inputs, float32, bfloat16, float16 or float64.
        g: [B, T, M] gradients of each sample's loss with respect to the outputs; a floating dtype, not necessarily that of x.
        gram: `input_gram(x)`, for several layers that share x; the form with it is then cheaper (T < 2 N). With it no Triton kernel runs.

    Returns:
        [B] float32 on the device of `x`: squares, not roots; of gradients, not of a mean over the batch. NaN where an input is NaN.
        Autograd sees constants, whatever the inputs.

    Raises:
        HftcoreError: shapes, dtypes or devices do not fit.

    Source: Goodfellow 2015 (arXiv:1510.01799) for T = 1; Li et al. 2022 (arXiv:2110.05679), section 4; here with symmetry, and chosen
    by operations rather than by memory.

    >>> grad_norms_sq(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]]))
    tensor([100.])
    """
    _check_tokens("x", x)
    _check_tokens("g", g)
    if x.shape[:2] != g.shape[:2] or x.device != g.device:
        raise HftcoreError(
            f"g must be [B, T, M] with the B and T and on the device of x, {tuple(x.shape[:2])} {x.device}, "
            f"got {tuple(g.shape)} {g.device}"
        )
    if gram is not None:
        if gram.shape != (x.shape[0], x.shape[1], x.shape[1]) or gram.dtype not in FLOATS or gram.device != x.device:
            raise HftcoreError(
                f"gram must be input_gram(x), of shape {(x.shape[0], x.shape[1], x.shape[1])} on {x.device}, "
                f"got {gram.dtype} {tuple(gram.shape)} on {gram.device}"
            )
        return host_kernels(x, g).grad_norms_sq(x, g, gram)
    if torch.float64 in (x.dtype, g.dtype):
        return gradients.grad_norms_sq(x.double(), g.double())
    with device_of(x):
        return _kernels(x, g).grad_norms_sq(x, g)


@torch.no_grad()
def input_gram(x: Tensor) -> Tensor:
    """x x^T of each sample, for `grad_norms_sq(..., gram=)` of several layers that share x: [B, T, T] float32 (float64 for float64).

    >>> input_gram(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]))
    tensor([[[25.,  3.],
             [ 3.,  1.]]])
    """
    _check_tokens("x", x)
    return gradients.input_gram(x)


@torch.no_grad()
def embedding_grad_norms_sq(ids: Tensor, g: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared norm of each sample's gradient of an embedding matrix; a repeated token's gradients are summed before squaring.

    Args:
        ids: [B, T] integer rows that were looked up, not negative.
        g: [B, T, M] gradients of each sample's loss with respect to the rows looked up.
        padding_idx: a row that gets no gradient, as `torch.nn.Embedding` has it.

    Returns:
        [B] float32 on the device of `g`.

    Raises:
        HftcoreError: shapes, dtypes or devices do not fit.

    >>> embedding_grad_norms_sq(torch.tensor([[5, 5, 7]]), torch.tensor([[[1.0], [2.0], [4.0]]]))
    tensor([25.])
    """
    _check_tokens("g", g)
    if ids.dtype not in (torch.int64, torch.int32) or ids.shape != g.shape[:2] or ids.device != g.device:
        raise HftcoreError(
            f"ids must be int64 or int32 of shape {tuple(g.shape[:2])} (g without its last axis) on {g.device}, "
            f"got {ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
    return gradients.embedding_grad_norms_sq(ids, g, padding_idx)


def _check_tokens(name: str, x: Tensor) -> None:
    dense(name, x)
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise HftcoreError(
            f"{name} must be [B, T, features] float32, bfloat16, float16 or float64, got {x.dtype} {tuple(x.shape)}; "
            "bring other leading axes into that shape first"
        )


def host_kernels(*tensors: Tensor) -> ModuleType:
    """The module that makes matrices of these: `native_gradients` where it serves them, else `gradients`."""
    device = tensors[0].device.type
    if device == "cpu" and backend_for(device) == "native":
        native = importlib.import_module("hftcore.kernels.native_gradients")
        if native.serves(*tensors):
            return cast(ModuleType, native)
    return gradients


def _kernels(x: Tensor, g: Tensor) -> ModuleType:
    is_triton = backend_for(x.device.type) == "triton"
    return importlib.import_module("hftcore.kernels.triton_gradients") if is_triton else host_kernels(x, g)
