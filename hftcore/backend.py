"""Which implementation of an op runs: `triton`, `native` or `torch`.

Order of choice: `with use_backend(...)`, then the variable `HFTCORE_BACKEND`, then the device. A device whose own backend is
missing is served by `torch`; the reason is logged once and shown by `hftcore doctor`.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from hftcore.errors import HftcoreError

BACKENDS = ("triton", "native", "torch")
log = logging.getLogger("hftcore")

_chosen: ContextVar[str | None] = ContextVar("hftcore_backend", default=None)

# ops that have a Triton kernel, and where; PyTorch does the others, most of them one pass of memory traffic, on a GPU
_TRITON = {
    "column_energy": "triton_energy",
    "prune_rows": "triton_rows",
    "prune_groups": "triton_rows",
    "score_histogram": "triton_matrix",
    "tie_counts": "triton_matrix",
    "cut": "triton_matrix",
    "nonfinite": "triton_matrix",
    "block_scores": "triton_blocks",
}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on one backend.

    Args:
        name: "triton", "native" or "torch".

    Raises:
        HftcoreError: unknown name. An op raises it later if the backend cannot serve the device of its tensors.

    >>> with use_backend("torch"):
    ...     float(column_energy(torch.tensor([[3.0], [4.0]])))
    25.0
    """
    token = _chosen.set(_known(name, "use_backend(name)"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise HftcoreError(f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@cache
def why_not(name: str, device: str) -> str | None:
    """Why backend `name` cannot serve tensors on `device` ("cpu", "cuda", …); None if it can."""
    if name == "native":
        if device != "cpu":
            return f"the native backend runs on cpu tensors, not on {device}"
        native = importlib.import_module("hftcore.kernels.native")
        return None if native.available() else native.reason()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on cpu tensors only in its interpreter (set TRITON_INTERPRET=1 before starting)"
        if device not in ("cpu", "cuda"):
            return f"the triton backend runs on CUDA and ROCm devices, not on {device}"
    return None


@cache
def _own(device: str) -> str:
    """The backend a device gets when nobody asks for another."""
    wanted = {"cuda": "triton", "cpu": "native"}.get(device, "torch")
    reason = why_not(wanted, device)
    if reason is None:
        return wanted
    log.warning("hftcore runs on the torch backend for %s tensors: %s", device, reason)
    return "torch"


def backend_for(device: str) -> str:
    """The backend that serves tensors on `device` here and now.

    >>> with use_backend("torch"):
    ...     backend_for("cpu")
    'torch'
    """
    asked = _chosen.get()
    if asked is None:
        variable = os.environ.get("HFTCORE_BACKEND")
        if not variable:
            return _own(device)
        asked = _known(variable, "the environment variable HFTCORE_BACKEND")
    reason = why_not(asked, device)
    if reason is not None:
        raise HftcoreError(f"backend {asked!r} was asked for, but {reason}")
    return asked


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"hftcore.kernels.{name}")


def device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """The block in which Triton launches on the tensor's device: it takes the current one, whatever the device of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(launch)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        with device_of(first):
            return launch(first, *rest)

    return call


@cache
def _function(op: str, backend: str) -> Callable[..., Any]:
    if backend == "triton":
        return _on_its_device(getattr(_module(_TRITON[op]), op)) if op in _TRITON else getattr(_module("eager"), op)
    return getattr(_module("native" if backend == "native" else "eager"), op)


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes `op` for tensors on `device`."""
    return _function(op, backend_for(device.type))
