"""Do an energy and a reference belong to this model? Asked before anything is measured or changed."""

from collections.abc import Sequence

from torch import Tensor, nn

from hftcore import checks
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, find_layers


def energy_layers(
    model: nn.Module, energy: Energy, targets: Targets | None = None, exclude: Targets | None = None
) -> list[Layer]:
    """The layers an energy was measured on, narrowed by `targets` and `exclude`, sorted by tensor name.

    Raises:
        HftcoreError: the energy has layers that the model has not, or of other sizes; or no layer is left.
    """
    known = {name for name, _ in model.named_modules()}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = find_layers(model, list(energy)) if energy and energy.keys() <= known else []
    layers = [layer for layer in layers if layer.name in energy]
    missing = sorted(energy.keys() - {layer.name for layer in layers})
    if missing or not layers:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise HftcoreError(
            f"energy has no layer in this model for: {', '.join(missing[:3]) or 'anything'}{more}; calibrate this model"
        )
    if targets is not None or exclude is not None:
        wanted = {layer.name for layer in find_layers(model, list(energy) if targets is None else targets, exclude)}
        layers = [layer for layer in layers if layer.name in wanted]
        if not layers:
            raise HftcoreError(
                f"targets {targets!r}, exclude {exclude!r} leave none of the layers that energy was measured on"
            )
    check_energy(energy, layers)
    return layers


def refuse_unmeasured(energy: Energy) -> None:
    """Refuse an energy that knows of no token at all: it would rank every weight by its position alone."""
    if not any(bool(value.any()) for value in energy.values()):
        raise HftcoreError(
            "energy is zero in every layer, as if no token had been counted; calibrate on data, or run the model inside capture_energy"
        )


def check_energy(energy: Energy, layers: Sequence[Layer], name: str = "energy") -> None:
    """Refuse an energy that lacks one of the layers, or has it in another size; the message calls it `name`."""
    for layer in layers:
        if layer.name not in energy:
            raise HftcoreError(f"{name} has no energy for {layer.name!r}; calibrate it on the same layers")
        wanted = (*layer.weight.shape[:-2], layer.weight.shape[-1])
        if energy[layer.name].shape != wanted:
            raise HftcoreError(
                f"{layer.tensor}: {name} must be of shape {wanted}, got {tuple(energy[layer.name].shape)}; calibrate this model"
            )


def reference_weights(reference: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Tensor name -> the stored weight of `reference` that stands for it, one for each of the layers.

    Raises:
        HftcoreError: `reference` is no module, has no such parameter, or one of another shape or dtype.
    """
    checks.model(reference, "reference")
    stored = dict(reference.named_parameters(remove_duplicate=False))
    found = {}
    for layer in layers:
        mine, other = getattr(layer.module, layer.parameter), stored.get(layer.tensor)
        if other is None:
            raise HftcoreError(
                f"reference has no parameter {layer.tensor!r}; both models must have the same parameters: "
                "merge an adapter first (merge_and_unload)"
            )
        if other.shape != mine.shape or other.dtype != mine.dtype:
            raise HftcoreError(
                f"reference {layer.tensor!r} must be {mine.dtype} {tuple(mine.shape)}, got {other.dtype} {tuple(other.shape)}"
            )
        found[layer.tensor] = other.data
    return found
