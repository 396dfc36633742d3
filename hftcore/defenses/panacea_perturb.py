"""Panacea's last step alone, for a model that somebody else fine-tuned; and what its perturbation is made of."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hftcore import checks
from hftcore.defenses.antidote import default_targets
from hftcore.defenses.merged import lora_factors
from hftcore.defenses.panacea import SPACES, step_length
from hftcore.defenses.perturbation import Gradients, Parameters, perturbed, trained
from hftcore.defenses.settings import check_choice, check_number
from hftcore.edit import Edit, difference
from hftcore.errors import HftcoreError
from hftcore.layers import Targets, find_layers
from hftcore.shards import is_sharded

DIRECTIONS = ("gradient", "random")


def panacea_perturb(
    model: nn.Module,
    harmful_batches: Iterable[Mapping[str, Tensor]] | None,
    rho: float = 1.0,
    *,
    targets: Targets | None = None,
    exclude: Targets | None = None,
    space: str = "trained",
    direction: str = "gradient",
    seed: int = 0,
) -> Edit:
    """Move a fine-tuned model by ρ along the gradient of its harmful loss, in place: Panacea with λ = 0, without training.

    Args:
        model: returns an object with `loss` where a batch has labels; left as it was if anything fails. Runs in evaluation mode.
        harmful_batches: harmful prompts and answers: dicts with `labels` [B, T], -100 where nothing is supervised, whose last axis the
            model shifts by one; they are moved to the model's device. The loss is the mean over the supervised tokens of all batches.
            None for direction "random".
        rho: ρ >= 0, the length of the perturbation; the paper's is 1 in the space of LoRA's factors.
        targets, exclude: layers in PEFT's convention; None: the LoRA factors where the model has an adapter, else all parameters that
            require a gradient.
        space: what ρ is the norm of: the change of the "trained" parameters, or of the "merged" weights.
        direction: "gradient", or "random", Gaussian noise of the same length, the paper's baseline.
        seed: of the noise.

    Returns:
        The Edit that was made; `edit.revert(model)` undoes it bit for bit, `edit.scaled(0.5)` goes half as far.

    Raises:
        HftcoreError: no batch, no labels, nothing supervised, or a harmful gradient of zero, which has no direction.
        NonFiniteError: the gradient holds NaN or infinity.

    Source: arXiv:2501.18100, eq. 2; Table 10 (λ = 0) and 17 (scale).

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> edit = panacea_perturb(layer, None, rho=0.5, direction="random")
    >>> moved = edit.tensors["weight"].after - edit.tensors["weight"].before
    >>> round(float(moved.norm()), 5), edit.recipe["method"]
    (0.5, 'panacea')
    """
    check_number("rho", rho, 0)
    check_choice("space", space, SPACES)
    check_choice("direction", direction, DIRECTIONS)
    checks.model(model)
    parameters = _chosen(model, targets, exclude)
    if cut := next((name for name, parameter in parameters.items() if is_sharded(parameter)), None):
        raise HftcoreError(
            f"{cut} is a DTensor, and panacea_perturb moves whole weights; take a model that is not sharded"
        )
    if direction == "random":
        along = _noise(parameters, seed)
    elif harmful_batches is None:
        raise HftcoreError('harmful_batches must be batches for direction "gradient", got None')
    else:
        along = _harmful_gradient(model, parameters, harmful_batches)
    if along.norm() == 0:
        raise HftcoreError(
            "the harmful gradient is zero, so there is no direction to move in; look at the data and its labels"
        )
    length = step_length(parameters, along, rho, space, lora_factors(model))
    recipe: dict[str, Any] = {"method": "panacea", "rho": rho, "space": space, "direction": direction}
    return displace(parameters, along, length, recipe | ({"seed": seed} if direction == "random" else {}))


def displace(
    parameters: Parameters, direction: Gradients, length: float, recipe: dict[str, Any], keeps: bool = True
) -> Edit:
    """Move parameters by length · d/‖d‖ for good, or not at all; sharded ones on all processes together.

    Returns:
        The Edit that was made, of whole weights; one of none where this process does not keep it.

    Raises:
        HftcoreError: a parameter of a dtype or shape that an Edit cannot hold (by name).
    """
    check_movable(parameters)
    with perturbed(parameters, direction, length):
        after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    entries = {}
    for name, parameter in parameters.items():
        old, new = whole(parameter.detach()), whole(after[name])
        if keeps:
            entries[name] = difference(old, new)
    with torch.no_grad():
        for name, moved in after.items():
            parameters[name].copy_(moved)
    return Edit({name: entry for name, entry in entries.items() if entry.before.numel()}, recipe)


def whole(tensor: Tensor) -> Tensor:
    """The tensor; of one that FSDP2 has cut all parts, for which every process makes the call."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def check_movable(parameters: Parameters) -> None:
    """Refuse parameters that an Edit cannot hold, by name: others than floating tensors of at most 3 dimensions."""
    for name, parameter in parameters.items():
        checks.floating(name, parameter)
        if parameter.dim() > 3:
            raise HftcoreError(f"{name} has {parameter.dim()} dimensions, an edit holds at most 3; leave it out")


def safety_coefficients(edit: Edit) -> dict[int, float]:
    """Σ|ε| over all entries of each decoder block, by its number, of the change that an Edit makes; what is in no block is left out.

    Source: arXiv:2501.18100, section 5 (Fig. 5).

    >>> layers = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(1, 1, bias=False))
    >>> edit = panacea_perturb(torch.nn.ModuleDict({"layers": layers}), None, rho=0.5, direction="random")
    >>> {block: round(value, 5) for block, value in safety_coefficients(edit).items()}
    {1: 0.5}
    """
    sums: dict[int, float] = {}
    for name, entry in edit.tensors.items():
        if found := re.search(r"\.(\d+)\.", name):
            after = torch.zeros_like(entry.before) if entry.after is None else entry.after
            block = int(found[1])
            sums[block] = sums.get(block, 0.0) + float((after.double() - entry.before.double()).abs().sum())
    return dict(sorted(sums.items()))


def _chosen(model: nn.Module, targets: Targets | None, exclude: Targets | None) -> Parameters:
    if targets is None and exclude is None and default_targets(model) != "lora":
        return trained(model)
    layers = find_layers(model, default_targets(model) if targets is None else targets, exclude)
    return {layer.tensor: layer.module.get_parameter(layer.parameter) for layer in layers}


def _noise(parameters: Parameters, seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        for name, parameter in parameters.items()
    }
    return Gradients({name: noise.to(parameters[name]) for name, noise in drawn.items()})


def _harmful_gradient(model: nn.Module, parameters: Parameters, batches: Iterable[Mapping[str, Tensor]]) -> Gradients:
    first, device = 0, next(model.parameters()).device
    with _only_gradients(model, parameters):
        for index, given in enumerate(batches):
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
            if "labels" not in batch:
                raise HftcoreError(
                    f"batch {index} has no labels; harmful_batches must hold prompts, answers and labels"
                )
            count = int((batch["labels"][..., 1:] != -100).sum())
            if not count:
                continue
            # the direction alone is wanted, so tokens are weighed against those of the first batch: no sum to know beforehand
            first = first or count
            (model(**batch).loss * (count / first)).backward()
        if not first:
            raise HftcoreError("harmful_batches hold no supervised token (labels other than -100)")
        return Gradients.take(parameters)


@contextmanager
def _only_gradients(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Evaluation mode and gradients for these parameters alone; everything as before afterwards."""
    every = list(model.parameters())
    wanted = {id(parameter) for parameter in parameters.values()}
    held = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter in every:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad, grad in held:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
