"""What the defences' update rules are made of: gradients set aside, and weights moved along them and put back bit for bit.

A rule works on `trained(model)`, a dict of parameters by name, and on passes: functions without arguments that run a forward and a
backward pass, add the gradient to `param.grad` and return the loss. Beside the parameters and their `.grad`, at most one copy of the
trained parameters exists while the weights are moved, and one for each `Gradients` that is held.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hftcore.defenses.set_aside import SetAside, leaves_rows_out
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.shards import Cut, add_parts, cut_of, held, is_sharded

Parameters = Mapping[str, nn.Parameter]
Pass = Callable[[], Tensor]

CHUNK = 1 << 18  # elements widened to float64 at a time: 2 MB stay in the cache, and no page is taken anew


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a tied one once, under its first name.

    Raises:
        HftcoreError: there is none.

    >>> list(trained(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise HftcoreError("the model has no trainable parameter; set requires_grad, or add an adapter")
    return parameters


class Gradients:
    """Gradients by parameter name; a parameter without one does not occur.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer(torch.tensor([3.0, 4.0])).backward()
    >>> taken = Gradients.take(trained(layer))
    >>> layer.weight.grad is None, taken.norm()
    (True, 5.0)
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def of(cls, parameters: Parameters) -> "Gradients":
        """Those in `param.grad`, which stay there: no copy."""
        return cls({name: p.grad for name, p in parameters.items() if p.grad is not None})

    @classmethod
    def take(cls, parameters: Parameters) -> "Gradients":
        """Those in `param.grad`, which is None afterwards: no copy."""
        taken = cls.of(parameters)
        for parameter in parameters.values():
            parameter.grad = None
        return taken

    def packed(self) -> "Gradients":
        """These, without the rows of zeros of an embedding or of unused experts, whose memory is free; to be added to others only."""
        for name, tensor in self.tensors.items():
            if not is_sharded(tensor) and leaves_rows_out(tensor):
                self.tensors[name] = tensor.to_sparse(1)
        return self

    def norm(self) -> float:
        """The 2-norm over all of them, summed in float64; not finite where a gradient is not."""
        return math.sqrt(self.dot(self))

    def dot(self, other: "Gradients") -> float:
        """The inner product with `other`, summed in float64; a gradient that one of the two lacks counts as zero."""
        total = 0.0
        with torch.no_grad():
            for (device, cut), pairs in self._paired(other).items():
                sums = torch.zeros((), dtype=torch.float64, device=device)
                for a, b in pairs:
                    ours, theirs = held(a).reshape(-1), held(b).reshape(-1)
                    for x, y in zip(ours.split(CHUNK), theirs.split(CHUNK), strict=True):
                        wide = x.double()
                        sums += torch.dot(wide, wide if a is b else y.double())
                total += float(add_parts(sums, cut))
        return total

    def add_(self, other: "Gradients", factor: float = 1.0) -> "Gradients":
        """Add `factor` times the other gradients to these, in place and in their dtype; returns itself."""
        with torch.no_grad():
            for name, tensor in other.tensors.items():
                if name in self.tensors:
                    self.tensors[name].add_(tensor, alpha=factor)
                else:
                    self.tensors[name] = tensor * factor
        return self

    def scale_(self, factor: float) -> "Gradients":
        """Multiply these by a number, in place; returns itself."""
        with torch.no_grad():
            for tensor in self.tensors.values() if factor != 1 else ():
                tensor.mul_(factor)
        return self

    def put(self, parameters: Parameters) -> None:
        """Leave these in an empty `param.grad`, so that a pass adds to them: no copy."""
        for name, tensor in self.tensors.items():
            parameters[name].grad = tensor

    def add_to_grad(self, parameters: Parameters, factor: float = 1.0) -> None:
        """Add `factor` times these to `param.grad`. Factor 0 leaves it alone, bit for bit."""
        if factor == 0:
            return
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                grad = parameters[name].grad
                if grad is None:
                    parameters[name].grad = (tensor.to_dense() if tensor.is_sparse else tensor) * factor
                else:
                    grad.add_(tensor, alpha=factor)

    def culprit(self) -> str:
        """The name of the first gradient that holds NaN or infinity."""
        wrong = (name for name, tensor in self.tensors.items() if not bool(held(tensor).isfinite().all()))
        return next(wrong, "all parameters together")

    def _paired(self, other: "Gradients") -> dict[tuple[torch.device, Cut | None], list[tuple[Tensor, Tensor]]]:
        pairs: dict[tuple[torch.device, Cut | None], list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in self.tensors.items():
            if name in other.tensors:
                pairs.setdefault((tensor.device, cut_of(tensor)), []).append((tensor, other.tensors[name]))
        return pairs


@contextmanager
def perturbed(parameters: Parameters, direction: Gradients, rho: float) -> Iterator[None]:
    """Inside the block the parameters are θ + ρ·d/‖d‖; afterwards they are θ again, bit for bit, also after an exception.

    Nothing else may write to them meanwhile: of a weight whose direction has rows of zeros only the rows that the step changed are kept.
    The norm is over all parameters together. The step is rounded once to the parameters' dtype. With ρ = 0, or a direction that is zero
    (the harmful loss is flat, or saturated), they stay as they are.

    Args:
        parameters: what is moved; a backward pass through a graph made inside must run inside.
        direction: d; not changed. Parameters without an entry stay.
        rho: ρ, the length of the step; negative for downhill.

    Raises:
        HftcoreError: rho is not finite.
        NonFiniteError: the direction holds NaN or infinity (by parameter name); nothing has been changed.

    Source: the normalised step of Booster, Panacea, Antibody and SAM. Their code divides by ‖d‖ + 1e-7 and restores by subtracting the
    step, which drifts by a rounding error a step.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    >>> with perturbed(trained(layer), Gradients({"weight": torch.tensor([[3.0, 4.0]])}), rho=-0.5):
    ...     print(layer.weight.tolist())
    [[0.699999988079071, 0.6000000238418579]]
    >>> layer.weight.tolist()
    [[1.0, 1.0]]
    """
    if not math.isfinite(rho):
        raise HftcoreError(f"rho must be a finite number, got {rho}")
    if rho == 0:
        yield
        return
    norm = finite_norm(direction, "the gradient to move along")
    if norm == 0:
        yield
        return
    moved = {name: parameters[name] for name in direction.tensors}
    originals: list[SetAside] = []
    try:
        with torch.no_grad():
            for name, parameter in moved.items():
                originals.append(SetAside(parameter))
                parameter.add_(direction.tensors[name], alpha=rho / norm)
                originals[-1].shrink(direction.tensors[name])
        # autocast keeps half-precision copies of the weights it has seen
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            while originals:
                originals.pop().put_back()
        torch.clear_autocast_cache()


def finite_norm(gradients: Gradients, what: str) -> float:
    """The norm, refused by parameter name where it is NaN or infinite."""
    norm = gradients.norm()
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"{what} is NaN or infinite in {gradients.culprit()!r}; lower the learning rate, or look at the data and the loss"
        )
    return norm


def gradient_change(
    parameters: Parameters, run: Pass, rho: float, inside: Callable[[], None] | None = None
) -> Gradients:
    """∇h(θ) − ∇h(θ + ρ·∇h(θ)/‖∇h(θ)‖), which Booster, Panacea and Antibody are built on; `param.grad` must be empty.

    Two passes, and one copy of the parameters beside their `.grad`, the unmoved weights: the second pass adds to the first's negative.

    Args:
        parameters: what is trained.
        run: the pass of h; it is run twice and must see the same data both times.
        rho: ρ; negative for downhill.
        inside: called last at the moved point, with empty `param.grad`; what it leaves there stays.

    Raises:
        HftcoreError: `param.grad` is not empty.
        NonFiniteError: a gradient of h holds NaN or infinity; the parameters are as before.

    >>> theta = nn.Parameter(torch.tensor([2.0]))                # h = θ², so the change is 2θ − 2(θ + ρ)
    >>> def run():
    ...     loss = theta.square().sum()
    ...     loss.backward()
    ...     return loss.detach()
    >>> gradient_change({"theta": theta}, run, rho=-0.5).tensors
    {'theta': tensor([1.])}
    """
    if any(parameter.grad is not None for parameter in parameters.values()):
        raise HftcoreError("param.grad must be empty before the passes of a defence; call zero_grad(set_to_none=True)")
    run()
    change = Gradients.take(parameters)
    with perturbed(parameters, change, rho):
        change.scale_(-1.0).put(parameters)
        run()
        change = Gradients.take(parameters).scale_(-1.0)
        if inside is not None:
            inside()
    finite_norm(change, "the gradient at the moved point")
    return change
