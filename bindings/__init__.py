"""Everything that knows somebody else's objects.

The trainers of `hftcore.bindings.trainers.METHODS` and their configs are names of this package, loaded on first use.
"""

import importlib
from typing import Any

from hftcore.bindings.trainers import METHODS


def __getattr__(name: str) -> Any:
    for method in METHODS.values():
        if name in (method.trainer, method.config):
            return getattr(importlib.import_module(method.module), name)
    raise AttributeError(f"module 'hftcore.bindings' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *(name for method in METHODS.values() for name in (method.trainer, method.config))]
