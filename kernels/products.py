"""Matrix products whose sums are float32 or better, whatever the dtype of the factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


@contextmanager
def fast_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let oneDNN multiply float32 copies of bfloat16 values on its bfloat16 units: the products and the float32 sums are the same."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b; factors narrower than `out` are taken as they are, which only tensor cores can."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
