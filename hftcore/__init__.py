"""hftcore: a kernel-accelerated engine for defending language models against harmful fine-tuning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hftcore import bindings, ops
    from hftcore.backend import use_backend
    from hftcore.calibration import calibrate
    from hftcore.capture import capture_energy
    from hftcore.defenses.antidote import antidote
    from hftcore.defenses.panacea_perturb import panacea_perturb
    from hftcore.edit import Edit
    from hftcore.energy import Energy
    from hftcore.errors import FingerprintError, HftcoreError, NonFiniteError
    from hftcore.grad_norms import capture_grad_norms
    from hftcore.pattern import Pattern
    from hftcore.pruning import prune

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
    "capture_grad_norms",
    "ops",
    "panacea_perturb",
    "prune",
    "use_backend",
]

# loaded on first use: torch takes seconds to import, transformers (through the bindings) seconds more
_HOMES = {
    "Edit": "hftcore.edit",
    "Energy": "hftcore.energy",
    "FingerprintError": "hftcore.errors",
    "HftcoreError": "hftcore.errors",
    "NonFiniteError": "hftcore.errors",
    "Pattern": "hftcore.pattern",
    "antidote": "hftcore.defenses.antidote",
    "calibrate": "hftcore.calibration",
    "capture_energy": "hftcore.capture",
    "capture_grad_norms": "hftcore.grad_norms",
    "panacea_perturb": "hftcore.defenses.panacea_perturb",
    "prune": "hftcore.pruning",
    "use_backend": "hftcore.backend",
}


def __getattr__(name: str) -> Any:
    if name in ("bindings", "ops"):
        return importlib.import_module(f"hftcore.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'hftcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
