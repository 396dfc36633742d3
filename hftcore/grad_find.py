"""Find the rule of every module that has parameters to train. Classes of other libraries are known by name and by what they compute."""

import inspect

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError
from hftcore.grad_experts import find_experts
from hftcore.grad_rules import Conv1DRule, EmbeddingRule, LinearRule, NormRule, RouterRule, Rule, with_weight


def find_rules(model: nn.Module) -> list[Rule]:
    """The rule of every module that has parameters to train.

    Raises:
        HftcoreError: a trained parameter belongs to a module of no known kind; nothing is trained.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    rules: list[Rule] = [*find_experts(model, names)]
    fused = {rule.module for rule in rules}
    for name, module in model.named_modules():
        if module in fused:
            continue
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
    if "Router" in type(module).__name__:
        return RouterRule(name, module)
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
