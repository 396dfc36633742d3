"""Energies of a model's layers on a data set."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.capture import Meter
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, body, find_layers
from hftcore.ranks import add_up_, together

Batch = Mapping[str, Any]
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    tokens: str = "all",
    average: str = "sum",
    progress: Progress | None = None,
    group: Any = None,
) -> Energy:
    """Energies of the model's layers over all batches.

    The model runs in evaluation mode without gradients, loss head or cache, and is left as it was. Beside the model
    and one batch this needs memory for the energies only.

    Args:
        batches: any iterable of dicts of tensors that the model's forward takes. Tokens with `attention_mask` 0 never
            count.
        targets, exclude: which layers, see `find_layers`.
        tokens: "all", or "response" to count only positions whose label is not -100.
        average: "sum", or "sample-norm" (see `capture_energy`).
        progress: wraps the iterable of batches, as `tqdm` does.
        group: of torch.distributed (`torch.distributed.group.WORLD`: all processes); each of them makes the call with the whole
            model and its own batches, perhaps none, and gets the sum over all of them: `energy_0 + energy_1 + ...` bit for bit.
            None: this process alone.

    Raises:
        HftcoreError: no batch, or no counted token; and what `capture_energy` raises. With a group, what goes wrong on one
            process is raised on all.
        NonFiniteError: a layer's input is not finite.

    Warns of layers and experts that saw no token: their energy is zero, so nothing is known about their weights.

    Source: Sun et al. 2023 (arXiv:2306.11695), and Huang et al. 2024 (arXiv:2408.09600) for the pass over the dense
    model; both feed the layers one after the other, which gives the same numbers when nothing is pruned on the way.

    >>> calibrate(nn.Linear(2, 1), [{"input": torch.tensor([[3.0, 1.0], [4.0, 1.0]])}])[""]
    tensor([25.,  2.])
    """
    with together(group):
        layers = find_layers(model, targets, exclude)
        meter = Meter(layers, tokens, average)
        runner = runs_without_head(model, layers)
        # not inference_mode: its tensors do not tell when they change, and shared inputs are recognised by that
        with evaluating(model), torch.no_grad(), meter.hooked(model):
            for inputs, arguments in prepared(runner, batches, progress):
                meter.begin(inputs)
                runner(**arguments)
                meter.end()
    if group is not None:
        add_up_(meter.energy, group)
    with together(group):
        meter.finish()
    check_counts(meter.energy, tokens)
    return meter.energy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def runs_without_head(model: nn.Module, layers: Iterable[Layer]) -> nn.Module:
    """The body of the model, or the model itself if a layer lies outside the body."""
    inner = body(model)
    inside = set(inner.modules())
    return inner if all(layer.module in inside for layer in layers) else model


def prepared(
    runner: nn.Module, batches: Iterable[Batch], progress: Progress | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each batch on the model's device: with its labels, and as arguments of `runner` (no labels, no cache)."""
    if not isinstance(batches, Iterable):
        raise HftcoreError(f"batches must be an iterable of dicts of tensors, got {type(batches).__name__}")
    device = next((parameter.device for parameter in runner.parameters()), torch.device("cpu"))
    takes_cache = "use_cache" in inspect.signature(runner.forward).parameters
    for batch in progress(batches) if progress else batches:
        if not isinstance(batch, Mapping):
            raise HftcoreError(f"batches must yield dicts of tensors, got {type(batch).__name__}")
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        arguments = {key: value for key, value in inputs.items() if key != "labels"}
        yield inputs, {**arguments, "use_cache": False} if takes_cache else arguments


def check_counts(energy: Energy, tokens: str) -> None:
    """Refuse an energy without tokens, and warn of layers and experts without."""
    if not energy.tokens:
        what = "every label is -100" if tokens == "response" else "every token is padding"
        raise HftcoreError(f"batches hold no token to count: there is no batch, or {what}")
    idle = [label for name in energy for label in energy.idle(name).values()]
    if idle:
        more = f" and {len(idle) - 8} more" if len(idle) > 8 else ""
        warnings.warn(f"saw no token, so nothing is known about: {', '.join(idle[:8])}{more}", stacklevel=3)
