"""The doses that `hftcore tune` knows: what each number means, and the reversible Edit it makes of a loaded model."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hftcore
from hftcore.defenses.panacea_perturb import panacea_perturb
from hftcore.edit import Edit, difference
from hftcore.errors import HftcoreError
from hftcore.layers import find_layers

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]
Dose = Callable[[float], Edit]


@dataclass(frozen=True)
class Method:
    """A way of dosing.

    Fields:
        meaning: of the number.
        highest: dose that is tried at most, unless the caller says otherwise.
        prepare: (model, harmful batches) -> a function that applies a dose to the model and returns the Edit.
        limit: largest dose there can be.
    """

    meaning: str
    highest: float
    prepare: Callable[[nn.Module, Batches], Dose]
    limit: float = math.inf


def antidote_dose(model: nn.Module, batches: Batches, score: Any = "wanda") -> Dose:
    """Antidote's share of removed weights; energies are measured once, on the unedited model."""
    from hftcore.defenses.antidote import default_targets

    energy = hftcore.calibrate(model, batches(), targets=default_targets(model)) if score == "wanda" else None
    return lambda ratio: hftcore.antidote(model, energy, dense_ratio=ratio, score=score)


def equal_norm_dose(model: nn.Module, batches: Batches) -> Dose:
    """As much as Antidote removes at that dose, in random places: a share of the weights whose norm is that of the weights it removes.

    The same number of weights at random would be less of the model, since Antidote takes the large ones.
    """
    from hftcore.defenses.antidote import default_targets

    antidote = antidote_dose(model, batches)
    layers = find_layers(model, default_targets(model))
    whole = sum(_square(layer.module.get_parameter(layer.parameter)) for layer in layers)

    def apply(ratio: float) -> Edit:
        edit = antidote(ratio)
        edit.revert(model)
        share = sum(_square(entry.before) for entry in edit.tensors.values()) / whole
        # of a whole matrix: rows are short, and rounding up in each would remove more
        return hftcore.antidote(model, None, dense_ratio=share, score="random", scope="matrix")

    return apply


def _square(weights: Tensor) -> float:
    return float(weights.detach().double().square().sum())


def panacea_dose(model: nn.Module, batches: Batches, direction: str = "gradient") -> Dose:
    """The length ρ of Panacea's perturbation; its direction is computed once, on the unedited model."""
    unit = panacea_perturb(model, batches() if direction == "gradient" else None, 1.0, direction=direction)
    unit.revert(model)
    return edit_dose(model, unit)


def shrink_dose(model: nn.Module, batches: Batches) -> Dose:
    """How much of the adapter goes: every B factor times 1 - dose, so that 1 leaves the base model. No data."""
    factors = {name: p.detach() for name, p in model.named_parameters() if ".lora_B." in name}
    if not factors:
        raise HftcoreError("shrink needs a model with a LoRA adapter; this one has none")
    entries = {name: difference(factor, torch.zeros_like(factor)) for name, factor in factors.items()}
    recipe = {"method": "shrink"}
    return edit_dose(model, Edit({name: entry for name, entry in entries.items() if entry.before.numel()}, recipe))


def edit_dose(model: nn.Module, whole: Edit) -> Dose:
    """How far an Edit goes: 0 nothing, 1 as it was made."""

    def apply(factor: float) -> Edit:
        edit = whole.scaled(factor)
        edit.apply(model)
        return edit

    return apply


_REMOVED, _LENGTH = "share of the weights removed", "length of the perturbation"

METHODS: dict[str, Method] = {
    "antidote": Method(_REMOVED, 0.5, antidote_dose, 1.0),
    "panacea": Method(_LENGTH, 16.0, panacea_dose),
    "shrink": Method("share of the adapter taken away", 1.0, shrink_dose, 1.0),
    "magnitude": Method(_REMOVED, 0.5, lambda m, b: antidote_dose(m, b, "magnitude"), 1.0),
    "random": Method(_REMOVED, 0.5, lambda m, b: antidote_dose(m, b, "random"), 1.0),
    "random-norm": Method("share that Antidote removes, the same norm at random", 0.5, equal_norm_dose, 1.0),
    "noise": Method(_LENGTH, 16.0, lambda m, b: panacea_dose(m, b, "random")),
}
