"""Experts whose weights lie fused in one 3-D parameter: each is a linear layer that sees some tokens of every sample."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError
from hftcore.grad_rules import LinearRule
from hftcore.layers import Layer, adapters
from hftcore.shards import is_sharded


@dataclass(eq=False)
class ExpertsRule(LinearRule):
    """The fused parameter of `layer`, or with `expert` the part of one of them; `parameters` are those of the whole.

    `sums` are the gradients of all experts on their way to a sharded parameter, and `is_last` tells that with this expert they are
    complete: a process adds up those it used, as many as they may be, and all processes exchange the whole once.
    """

    layer: Layer = field(kw_only=True)
    expert: int | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    is_last: bool = False

    def __post_init__(self) -> None:
        self.transposed = self.layer.transposed

    def of(self, expert: int) -> "ExpertsRule":
        return ExpertsRule(self.name, self.module, self.parameters, layer=self.layer, expert=expert, sums=self.sums)

    def parameter(self, own: str) -> nn.Parameter:
        suffix = "_bias" if own == "bias" else ""
        return cast(nn.Parameter, self.module._parameters[self.layer.parameter + suffix])

    def key(self, own: str) -> str:
        return f"{self.parameters[own]}[{self.expert}]"

    def add_gradient(self, own: str, value: Tensor) -> None:
        parameter = self.parameter(own)
        if is_sharded(parameter):
            if own not in self.sums:
                self.sums[own] = torch.zeros(parameter.shape, dtype=value.dtype, device=value.device)
            self.sums[own][self.expert] += value
            if self.is_last:
                super().add_gradient(own, self.sums.pop(own))
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[self.expert] += value.to(parameter.dtype)


class Pool:
    """The gradients of a fused parameter, gathered from all experts that one call of the module ran."""

    def __init__(self) -> None:
        self.open = 0
        self._whole: dict[str, Tensor] = {}

    def put(self, rule: ExpertsRule, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take one expert's gradients; returns those of the whole with the last expert, and nothing before."""
        for own, value in found.items():
            if own not in self._whole:
                self._whole[own] = torch.zeros_like(rule.parameter(own))
            self._whole[own][rule.expert] = value
        self.open -= 1
        rule.is_last = not self.open
        return {} if self.open else self._whole


def find_experts(model: nn.Module, names: dict[nn.Parameter, str]) -> list[ExpertsRule]:
    """One rule for each fused parameter that is trained, or whose bias is.

    Raises:
        HftcoreError: a trained fused parameter of an unknown layout, or another parameter beside fused ones.
    """
    rules = []
    for adapter in adapters(model):
        for name, module, fused in adapter.fused_experts(model):
            trained = {own: names[p] for own, p in module._parameters.items() if p is not None and p.requires_grad}
            for own, transposed in fused.items():
                parts = {"weight": own, "bias": f"{own}_bias"}
                parameters = {part: trained.pop(key) for part, key in parts.items() if key in trained}
                if not parameters:
                    continue
                if transposed is None:
                    raise HftcoreError(
                        f"per-sample gradients of parameter {parameters.get('weight')!r} are not known: its layout in a "
                        f"{type(module).__name__} is not; freeze it (requires_grad_(False))"
                    )
                layer = Layer(f"{name}.{own}", f"{name}.{own}", module, own, transposed)
                rules.append(ExpertsRule(name, module, parameters, layer=layer))
            if trained:
                raise HftcoreError(
                    f"per-sample gradients of parameter {next(iter(trained.values()))!r} are not known: it is not one of the "
                    f"fused experts of its module {name!r}; freeze it (requires_grad_(False))"
                )
    return rules


def by_sample(x: Tensor, g: Tensor, tokens: Tensor, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """The rows that an expert saw, put beside their samples' and filled up with zeros.

    x [t, N] and g [t, M] with `tokens` [t] their rows in a batch flattened from [samples, length]; returns x [B, most, N] and
    g [B, most, M], `most` being the largest number of rows of a sample.
    """
    sample = tokens // length
    order = sample.argsort(stable=True)
    counts = torch.bincount(sample, minlength=samples)
    place = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[sample[order]]
    shape = samples, int(counts.max())
    rows = [torch.zeros(*shape, value.shape[1], dtype=value.dtype, device=value.device) for value in (x, g)]
    for whole, value in zip(rows, (x, g), strict=True):
        whole[sample[order], place] = value[order]
    return rows[0], rows[1]
