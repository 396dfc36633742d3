"""Defences as subclasses of `transformers.Trainer`. A line in `METHODS` adds one; loading one loads only that one."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """Where a defence's trainer and config live, and which data sets it takes beside the training set."""

    module: str
    trainer: str
    config: str
    datasets: tuple[str, ...] = ()

    def load(self) -> tuple[Any, Any]:
        """(trainer class, config class)."""
        home = importlib.import_module(self.module)
        return getattr(home, self.trainer), getattr(home, self.config)


_ANTIBODY = "hftcore.bindings.trainers.antibody"
_PANACEA = "hftcore.bindings.trainers.panacea"

METHODS: dict[str, Method] = {
    "antibody-align": Method(_ANTIBODY, "AntibodyAlignTrainer", "AntibodyAlignConfig", ("harmful_dataset",)),
    "antibody": Method(_ANTIBODY, "AntibodyTrainer", "AntibodyConfig"),
    "panacea": Method(_PANACEA, "PanaceaTrainer", "PanaceaConfig", ("harmful_dataset",)),
}
