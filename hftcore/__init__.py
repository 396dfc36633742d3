"""hftcore: a kernel-accelerated engine for defending language models against harmful fine-tuning."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from hftcore import ops
from hftcore.backend import use_backend
from hftcore.calibration import calibrate
from hftcore.capture import capture_energy
from hftcore.defenses.antidote import antidote
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import FingerprintError, HftcoreError, NonFiniteError
from hftcore.pattern import Pattern
from hftcore.pruning import prune

if TYPE_CHECKING:
    from hftcore import bindings

__version__ = "0.1.0"

__all__ = [
    "Edit",
    "Energy",
    "FingerprintError",
    "HftcoreError",
    "NonFiniteError",
    "Pattern",
    "antidote",
    "bindings",
    "calibrate",
    "capture_energy",
    "ops",
    "prune",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    # the bindings bring transformers, which takes seconds: only on first use
    if name == "bindings":
        return importlib.import_module("hftcore.bindings")
    raise AttributeError(f"module 'hftcore' has no attribute {name!r}")
