"""Find the rule of every module that has parameters to train. Classes of other libraries are known by name and by what they compute."""

import inspect

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError
from hftcore.grad_experts import find_experts
from hftcore.grad_rules import Conv1DRule, EmbeddingRule, LinearRule, NormRule, RouterRule, Rule, with_parameters

# of PEFT: they look one prompt up and repeat it for the batch, and what comes back of it is a sum over samples
SHARED_PROMPTS = ("PromptEmbedding", "MultitaskPromptEmbedding", "PromptEncoder")


def find_rules(model: nn.Module, modules: dict[str, nn.Module], names: dict[nn.Parameter, str]) -> list[Rule]:
    """The rule of every module that has parameters to train; `modules` are all of the model, and `names` those of all parameters.

    Raises:
        HftcoreError: a trained parameter belongs to a module of no known kind; nothing is trained.
    """
    rules: list[Rule] = [*find_experts(model, names)]
    fused = {rule.module for rule in rules}
    for name, module in modules.items():
        if module in fused:
            continue
        _refuse_dora(name, module)
        if type(module).__name__ in SHARED_PROMPTS and any(p.requires_grad for p in module.parameters()):
            raise HftcoreError(
                f"per-sample gradients of {name!r} ({type(module).__name__}) are not known: its prompt is looked up once for the whole "
                "batch; train LoRA factors or a prefix instead, or freeze it"
            )
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


def _refuse_dora(name: str, module: nn.Module) -> None:
    """Its magnitudes have no rule, and beside the batch its factors multiply an identity matrix, whose rows are no samples'."""
    is_dora = bool(module._modules.get("lora_magnitude_vector"))
    if is_dora and any(p.requires_grad for own, p in module.named_parameters() if own.startswith("lora_")):
        raise HftcoreError(
            f"per-sample gradients of layer {name!r} are not known: its LoRA is DoRA; train with use_dora=False, or freeze it"
        )


def _rule(name: str, module: nn.Module) -> Rule | None:
    if _is_linear(module):
        return LinearRule(name, module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Conv1DRule(name, module)
    if isinstance(module, nn.Embedding):
        unlike = [option for option in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, option)]
        if unlike:
            raise HftcoreError(f"per-sample gradients of embedding {name!r} are not known with {unlike[0]}; freeze it")
        return EmbeddingRule(name, module)
    if type(module).__name__.endswith(("RMSNorm", "LayerNorm", "LayerNorm1P")):
        return _norm_rule(name, module)
    if "Router" in type(module).__name__:
        return RouterRule(name, module)
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether it is an `nn.Linear`, or a subclass of one that computes the same on random input (as Falcon's does)."""
    if type(module).forward is nn.Linear.forward:
        return True
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            have = type(module).forward(module, x)
        except (TypeError, ValueError, RuntimeError):
            return False  # it takes something else
        want = nn.functional.linear(x, weight, module.bias)
    return isinstance(have, Tensor) and have.shape == want.shape and _agree(have, want, weight.dtype)


def _norm_rule(name: str, module: nn.Module) -> NormRule | None:
    """The rule whose result is the module's own on random input and with random parameters, or None."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return None
    eps = next((getattr(module, key) for key in ("eps", "variance_epsilon", "epsilon") if hasattr(module, key)), None)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(8, len(weight), generator=generator).to(weight.device, weight.dtype)
    x, probe, bias = draw[:6].unflatten(0, (2, 3)), draw[6], draw[7]
    has_bias = module._parameters.get("bias") is not None
    probes = {"weight": probe, "bias": bias} if has_bias else {"weight": probe}
    try:
        inspect.signature(type(module).forward).bind(module, x)
    except TypeError:
        return None
    with torch.no_grad():
        want = with_parameters(module, probes, x)
        for mean in (False, True):
            rule = NormRule(name, module, matrix=None)
            rule.mean = mean
            rule.eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
            for factor in (probe, 1 + probe):
                have = rule.normalised(x) * factor + (bias if has_bias else 0)
                if isinstance(want, Tensor) and _agree(want, have, weight.dtype):
                    return rule
    return None


def _agree(have: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    close = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    return torch.allclose(have.to(want.dtype), want, rtol=close, atol=close)
