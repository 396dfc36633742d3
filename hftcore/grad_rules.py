"""What the parameters of a module are to its gradient: one rule for each kind of module that per-sample gradients are known for.

A rule tells, of one call of its module, the pair (x, g) that makes up the gradient: g of the outputs [B, ..., M], and x that depends
on the kind (inputs, token ids, normalised inputs). Classes of other libraries are known by name and by what they compute.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError
from hftcore.kernels.products import accumulator, widened
from hftcore.shards import is_sharded, mean_part


@dataclass(eq=False)
class Rule:
    """`parameters`: attribute name -> name in the model, of those that are trained. `matrix` is the attribute that is one, if any."""

    name: str
    module: nn.Module
    parameters: dict[str, str] = field(default_factory=dict)
    matrix: str | None = "weight"

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, float | Tensor]:
        """x of a call, and the factor by which the module multiplies its result."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise HftcoreError(
                f"module {self.name!r} ({type(self.module).__name__}) was called with {len(tensors)} tensors, and per-sample gradients "
                "of it are known for one; freeze its parameters"
            )
        return tensors[0], 1.0

    def vectors(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Each sample's gradient of the parameters that are vectors: attribute -> [B, M], from x and g of [B, T, features]."""
        return {"bias": g.sum(dim=1, dtype=accumulator(g.dtype))} if "bias" in self.parameters else {}

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the matrix, summed over samples and tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no matrix")

    def parameter(self, own: str) -> nn.Parameter:
        return cast(nn.Parameter, self.module._parameters[own])

    def key(self, own: str) -> str:
        """What tells apart the matrices whose norms are taken separately."""
        return self.parameters[own]

    def add_gradient(self, own: str, value: Tensor) -> None:
        """Add to `param.grad`; of a sharded parameter the mean over the processes, as its ordinary backward pass leaves."""
        parameter = self.parameter(own)
        if is_sharded(parameter):
            value = mean_part(value, parameter)
        value = value.to(parameter.dtype)
        parameter.grad = value if parameter.grad is None else parameter.grad.add_(value)


class LinearRule(Rule):
    """y = x W^T + b; with `transposed`, W is stored as [N, M]."""

    transposed = False

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        left, right = (x, g) if self.transposed else (g, x)
        return left.flatten(0, 1).t() @ right.flatten(0, 1).to(left.dtype)


class Conv1DRule(LinearRule):
    transposed = True


class RouterRule(LinearRule):
    """A linear layer inside a module that does more with its result, as the routers of experts do."""


class EmbeddingRule(Rule):
    """Rows looked up by token ids; subclasses may compute the ids from their arguments and scale the rows."""

    @property
    def padding_idx(self) -> int | None:
        return cast(nn.Embedding, self.module).padding_idx

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, float | Tensor]:
        if type(self.module).forward is nn.Embedding.forward:
            return super().inputs(args, kwargs)
        weight = self.parameter("weight")
        rows = torch.arange(weight.shape[0], dtype=torch.float64, device=weight.device)
        # a table whose rows are (own number, 1) tells which rows the module takes and by what it multiplies them
        with torch.no_grad():
            table = torch.stack((rows, torch.ones_like(rows)), dim=1)
            probe = with_parameters(self.module, {"weight": table}, *args, **kwargs)
            factor = with_parameters(self.module, {"weight": torch.ones_like(weight[:, :1])}, *args, **kwargs)
        return (probe[..., 0] / probe[..., 1]).round().long(), factor

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        total = torch.zeros(self.parameter("weight").shape, dtype=accumulator(g.dtype), device=g.device)
        total.index_add_(0, x.flatten(), g.flatten(0, 1).to(total.dtype))
        if self.padding_idx is not None:
            total[self.padding_idx] = 0
        return total


class NormRule(Rule):
    """y = normalised x times a vector (or 1 + a vector), plus perhaps another; `mean` tells whether the mean is taken off."""

    eps = 0.0
    mean = False

    def normalised(self, x: Tensor) -> Tensor:
        x = self._centred(x)
        return x * self._scale(x)

    def vectors(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        found = super().vectors(x, g)
        if "weight" in self.parameters:
            x = self._centred(x)
            found["weight"] = (self._scale(x).mT @ (x * g)).squeeze(1)
        return found

    def _centred(self, x: Tensor) -> Tensor:
        x = widened(x)
        return x - x.mean(dim=-1, keepdim=True) if self.mean else x

    def _scale(self, x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return square.div_(x.shape[-1]).add_(self.eps).rsqrt_()


def with_parameters(module: nn.Module, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `module` computes with other values of its own parameters; its hooks do not run."""
    kept = {name: module._parameters[name] for name in values}
    module._parameters.update({name: nn.Parameter(value, requires_grad=False) for name, value in values.items()})
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(kept)
