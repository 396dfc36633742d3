"""Argument checks. Every message names the argument, what was got and what was wanted."""

import math

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.shards import is_sharded

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dense(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise HftcoreError(f"{name} must be a tensor, got {type(value).__name__}")
    plain(name, value)
    if value.layout != torch.strided:
        raise HftcoreError(f"{name} must be a dense tensor, got one of layout {value.layout}")


def plain(name: str, tensor: Tensor) -> None:
    if is_sharded(tensor):  # a DTensor has no address of its own: kernels would read at 0
        raise HftcoreError(
            f"{name} must be a plain tensor, got a DTensor; prune such models with hftcore.dtensors.prune_sharded, "
            "or work on what this process holds (to_local)"
        )


def model(value: object, name: str = "model") -> None:
    if not isinstance(value, nn.Module):
        raise HftcoreError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise HftcoreError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; convert it (dequantise packed weights) first"
        )


def weight(tensor: Tensor, reference: Tensor | None) -> None:
    dense("weight", tensor)
    if tensor.is_meta:
        raise HftcoreError("weight must have values, got a tensor on the meta device; load it onto a real device first")
    if tensor.dim() != 2:
        raise HftcoreError(f"weight must be [out_features, in_features], got shape {tuple(tensor.shape)}")
    floating("weight", tensor)
    if reference is None:
        return
    dense("reference", reference)
    if reference.shape != tensor.shape or reference.dtype != tensor.dtype:
        raise HftcoreError(
            f"reference must have the shape and dtype of weight, {tuple(tensor.shape)} {tensor.dtype}, "
            f"got {tuple(reference.shape)} {reference.dtype}"
        )
    same_device("reference", reference, tensor)


def same_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise HftcoreError(f"{name} must be on {like.device} with weight, got {tensor.device}")


def norm(energy: Tensor, like: Tensor) -> Tensor:
    """The square root of an energy that fits: [N] float32. Not finite where the energy is not, or is negative."""
    dense("energy", energy)
    plain("weight", like)
    if energy.shape != like.shape[-1:] or energy.dtype != torch.float32:
        raise HftcoreError(
            f"energy must be float32 of shape ({like.shape[-1]},) (one value for each column of weight), "
            f"got {energy.dtype} {tuple(energy.shape)}"
        )
    same_device("energy", energy, like)
    return energy.contiguous().sqrt()


def finite_norm(norm: Tensor) -> None:
    # the largest root is NaN if any energy is NaN or negative, and infinite if any is infinite
    if norm.numel() and not math.isfinite(float(norm.max())):
        raise NonFiniteError("energy must be finite and not negative; calibrate again on clean data")
