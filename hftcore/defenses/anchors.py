"""Weights remembered: pulled towards, or put in the parameters' place for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hftcore.defenses.perturbation import Parameters


def snapshot(parameters: Parameters) -> dict[str, Tensor]:
    """A copy of the parameters' values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def pull(parameters: Parameters, anchor: Mapping[str, Tensor], rho: float) -> Tensor:
    """Add the gradient of ρ/2 ‖w − anchor‖², which is ρ(w − anchor), to `param.grad`; returns that term's value (0-d).

    >>> theta = torch.nn.Parameter(torch.tensor([3.0]))
    >>> pull({"theta": theta}, {"theta": torch.tensor([1.0])}, rho=0.5), theta.grad
    (tensor(1.), tensor([1.]))
    """
    value = torch.zeros(())
    with torch.no_grad():
        for name, parameter in parameters.items():
            away = parameter - anchor[name]
            value = value.to(away.device) + rho / 2 * away.float().square().sum()
            if parameter.grad is None:
                parameter.grad = away.mul_(rho)
            else:
                parameter.grad.add_(away, alpha=rho)
    return value


@contextmanager
def swapped(parameters: Parameters, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the parameters hold `values`; afterwards their own again, also after an exception. Nothing is copied."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        # autocast keeps half-precision copies of the weights it has seen
        torch.clear_autocast_cache()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
        torch.clear_autocast_cache()
