"""What the parameters of a module are to its gradient: one rule for each kind of module that per-sample gradients are known for.

A rule tells, of one call of its module, the pair (x, g) that makes up the gradient: g of the outputs [B, ..., M], and x that depends
on the kind (inputs, token ids, normalised inputs). Classes of other libraries are known by name and by what they compute.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError


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
        return {"bias": g.sum(dim=1, dtype=_wide(g))} if "bias" in self.parameters else {}

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the matrix, summed over samples and tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no matrix")

    def parameter(self, own: str) -> nn.Parameter:
        return cast(nn.Parameter, self.module._parameters[own])


class LinearRule(Rule):
    """y = x W^T + b; with `transposed`, W is stored as [N, M]."""

    transposed = False

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        left, right = (x, g) if self.transposed else (g, x)
        return left.flatten(0, 1).t() @ right.flatten(0, 1).to(left.dtype)


class Conv1DRule(LinearRule):
    transposed = True


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
            probe = with_weight(self.module, torch.stack((rows, torch.ones_like(rows)), dim=1), *args, **kwargs)
            factor = with_weight(self.module, torch.ones_like(weight[:, :1]), *args, **kwargs)
        return (probe[..., 0] / probe[..., 1]).round().long(), factor

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        total = torch.zeros(self.parameter("weight").shape, dtype=_wide(g), device=g.device)
        total.index_add_(0, x.flatten(), g.flatten(0, 1).to(total.dtype))
        if self.padding_idx is not None:
            total[self.padding_idx] = 0
        return total


class NormRule(Rule):
    """y = normalised x times a vector (or 1 + a vector), plus perhaps another; `mean` tells whether the mean is taken off."""

    eps = 0.0
    mean = False

    def normalised(self, x: Tensor) -> Tensor:
        x = x.to(_wide(x))
        if self.mean:
            x = x - x.mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def vectors(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        found = super().vectors(x, g)
        if "weight" in self.parameters:
            found["weight"] = (self.normalised(x) * g).sum(dim=1)
        return found


def find_rules(model: nn.Module) -> list[Rule]:
    """The rule of every module that has parameters to train.

    Raises:
        HftcoreError: a trained parameter belongs to a module of no known kind; nothing is trained.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    rules = []
    for name, module in model.named_modules():
        trained = {own: names[p] for own, p in module._parameters.items() if p is not None and p.requires_grad}
        if not trained:
            continue
        rule = _rule(name, module)
        if rule is None or not set(trained) <= {"weight", "bias"}:
            raise HftcoreError(
                f"per-sample gradients of parameter {next(iter(trained.values()))!r} are not known: its module {name!r} is a "
                f"{type(module).__name__}; freeze it (requires_grad_(False))"
            )
        rule.parameters = trained
        rules.append(rule)
    if not rules:
        raise HftcoreError(
            "model has no parameter that requires a gradient, so there are no gradients to take norms of"
        )
    return rules


def _rule(name: str, module: nn.Module) -> Rule | None:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return LinearRule(name, module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Conv1DRule(name, module)
    if isinstance(module, nn.Embedding):
        unlike = [option for option in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, option)]
        if unlike:
            raise HftcoreError(f"per-sample gradients of embedding {name!r} are not known with {unlike[0]}; freeze it")
        return EmbeddingRule(name, module)
    if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
        return _norm_rule(name, module)
    return None


def _norm_rule(name: str, module: nn.Module) -> NormRule | None:
    """The rule whose result is the module's own on random input and with a random weight, or None."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return None
    eps = next((getattr(module, key) for key in ("eps", "variance_epsilon", "epsilon") if hasattr(module, key)), None)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(7, len(weight), generator=generator).to(weight.device, weight.dtype)
    x, probe = draw[:6].unflatten(0, (2, 3)), draw[6]
    bias = getattr(module, "bias", None)
    close = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    try:
        inspect.signature(type(module).forward).bind(module, x)
    except TypeError:
        return None
    with torch.no_grad():
        want = with_weight(module, probe, x)
        for mean in (False, True):
            rule = NormRule(name, module, matrix=None)
            rule.mean = mean
            rule.eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
            for factor in (probe, 1 + probe):
                have = rule.normalised(x) * factor + (0 if bias is None else bias)
                if isinstance(want, Tensor) and torch.allclose(want.to(have.dtype), have, rtol=close, atol=close):
                    return rule
    return None


def with_weight(module: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What `module` computes with another weight; its hooks do not run."""
    kept = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters["weight"] = kept


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
