"""What this machine allows: passes over memory and a matrix product that no kernel can beat by much, timed in the same rounds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IN_PLACE, READ, COPY, MATMUL, OP = "in place mul_(1)", "read sum()", "copy_", "matmul", "one torch op"
PASSES = {IN_PLACE: 2, READ: 1, COPY: 2}  # how often each byte of the buffer crosses the memory bus
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied: large enough for full speed


def ceilings(buffer: Tensor, source: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls to time beside a kernel, in the same rounds and on the same buffer.

    Args:
        buffer: what the kernel works on; its values are kept.
        source: the same values elsewhere, copied from.

    Returns:
        `mul_(1)` (one read, one write of each byte), `sum()` (one read), `copy_` (one read, one write elsewhere).
    """
    return {
        IN_PLACE: lambda: buffer.mul_(1),
        READ: lambda: buffer.sum(),
        COPY: lambda: buffer.copy_(source),
    }


def reading(buffer: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ceiling of an op that only reads its input."""
    return {READ: lambda: buffer.sum()}


def multiplying(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The ceiling of an op made of matrix products: a square product in the same dtype."""
    side = SIDE[device.type]
    a = torch.randn(side, side, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    out = torch.empty_like(a)
    return {MATMUL: lambda: torch.mm(a, a, out=out)}


def share(ours: dict[str, Any], ceiling: Callable[[str], dict[str, Any] | None]) -> float | None:
    """How near a measurement is to what the machine allows: the time an ideal kernel would take over ours, 1 at best.

    The ideal kernel moves the case's bytes at the rate of the in-place pass (of the read where nothing is written back), and multiplies
    at the rate of the square product; the slower of the two counts.

    Args:
        ours: a line of a result file.
        ceiling: name -> its line in the same case, or None.

    Returns:
        None where the case says nothing of its work, or no ceiling was timed.

    >>> line = {"size": [2, 4], "dtype": "float32", "device": "cpu", "bytes_moved": 64, "median_ms": 4.0}
    >>> share(line, {IN_PLACE: {"median_ms": 1.0}}.get)
    0.25
    """
    times = []
    memory = {name: line for name in (READ, IN_PLACE) if (line := ceiling(name)) is not None}
    if memory and ours["bytes_moved"]:
        name, line = memory.popitem()
        buffer = torch.Size(ours["size"]).numel() * getattr(torch, ours["dtype"]).itemsize
        times.append(ours["bytes_moved"] / (PASSES[name] * buffer) * line["median_ms"])
    product = ceiling(MATMUL)
    if product and ours.get("products"):
        times.append(ours["products"] / (2 * SIDE[ours["device"]] ** 3) * product["median_ms"])
    return max(times) / ours["median_ms"] if times else None
