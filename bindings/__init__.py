"""Everything that knows somebody else's objects.

The trainers of `hftcore.bindings.trainers.METHODS` and their configs are names of this package, as is `weighted_loss`; they are loaded on
first use.
"""

import importlib
from typing import Any

from hftcore.bindings.trainers import METHODS

_HOMES = {"weighted_loss": "hftcore.bindings.trainers.weighting"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    for method in METHODS.values():
        if name in (method.trainer, method.config):
            return getattr(importlib.import_module(method.module), name)
    raise AttributeError(f"module 'hftcore.bindings' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *(name for method in METHODS.values() for name in (method.trainer, method.config))]
