"""Defences as subclasses of `transformers.Trainer`. A line in `METHODS` adds one; loading one loads only that one."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """Where a defence's trainer and config live, and which data sets it takes beside the training set.

    `is_paired`: the training set is pairs of a harmless and a harmful answer, as `hftcore.bindings.trainers.pairs` makes them.
    """

    module: str
    trainer: str
    config: str
    datasets: tuple[str, ...] = ()
    is_paired: bool = False

    def load(self) -> tuple[Any, Any]:
        """(trainer class, config class)."""
        home = importlib.import_module(self.module)
        return getattr(home, self.trainer), getattr(home, self.config)


_HERE = "hftcore.bindings.trainers"
_HARMFUL = ("harmful_dataset",)

METHODS: dict[str, Method] = {
    "sft": Method(f"{_HERE}.sft", "SFTTrainer", "SFTConfig"),
    "antibody-align": Method(f"{_HERE}.antibody", "AntibodyAlignTrainer", "AntibodyAlignConfig", _HARMFUL),
    "antibody": Method(f"{_HERE}.antibody", "AntibodyTrainer", "AntibodyConfig"),
    "panacea": Method(f"{_HERE}.panacea", "PanaceaTrainer", "PanaceaConfig", _HARMFUL),
    "immunize": Method(f"{_HERE}.immunization", "ImmunizationTrainer", "ImmunizationConfig", is_paired=True),
    "booster": Method(f"{_HERE}.booster", "BoosterTrainer", "BoosterConfig", _HARMFUL),
    "vaccine": Method(f"{_HERE}.vaccine", "VaccineTrainer", "VaccineConfig"),
    "lisa": Method(f"{_HERE}.lisa", "LisaTrainer", "LisaConfig", ("alignment_dataset",)),
    "ldifs": Method(f"{_HERE}.ldifs", "LDIFSTrainer", "LDIFSConfig"),
    "repnoise": Method(f"{_HERE}.repnoise", "RepNoiseTrainer", "RepNoiseConfig", is_paired=True),
    "safemoe": Method(f"{_HERE}.safemoe", "SafeMoETrainer", "SafeMoEConfig", ("safety_dataset",)),
}
