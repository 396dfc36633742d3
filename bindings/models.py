"""What transformers' and PEFT's classes mean: the adapter of `hftcore.layers`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hftcore.errors import HftcoreError
from hftcore.layers import Layer

IMPLEMENTATION = "hftcore"
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")

Observe = Callable[[Layer, int, Tensor, Tensor, Tensor], Tensor]


def linear_like(module: nn.Module) -> tuple[str, bool] | None:
    """Conv1D is a linear layer whose weight is stored [in, out]."""
    return ("weight", True) if isinstance(module, Conv1D) else None


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, bool | None]]]:
    """Modules that hold the weights of all experts in 3-D parameters, with their orientation where it is known."""
    for name, module in model.named_modules():
        if "Expert" not in type(module).__name__:
            continue
        fused = [key for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if not fused:
            continue
        # transformers writes these flags on every class that takes part in its experts interface
        known = hasattr(module, "is_transposed") and hasattr(module, "has_gate") and set(fused) <= set(PROJECTIONS)
        yield name, module, {key: bool(module.is_transposed) if known else None for key in fused}


def body(model: nn.Module) -> nn.Module:
    """The transformer without its loss head; LoRA layers inside it stay."""
    # prompt learning prepends its tokens in the wrapper, so the wrapper must run
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if callable(get := getattr(model, "get_base_model", None)) and not prompts:
        model = get()
    if not isinstance(model, PreTrainedModel):
        return model
    if getattr(model.config, "is_encoder_decoder", False):
        raise HftcoreError(
            f"{type(model).__name__} is an encoder-decoder, which has two token masks; use a decoder-only model"
        )
    return model.base_model


@contextmanager
def capture_experts(layers: Sequence[Layer], observe: Observe) -> Iterator[None]:
    """Run the experts of `layers` one by one and show both projections to `observe`, see `hftcore.layers`; undone on exit."""
    wanted = {(layer.module, layer.parameter): layer for layer in layers}
    configs: dict[int, Any] = {id(layer.module.config): layer.module.config for layer in layers}
    before = {key: config._experts_implementation for key, config in configs.items()}
    name = f"{IMPLEMENTATION}-{id(wanted)}"

    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _experts_forward(experts, hidden_states, top_k_index, top_k_weights, wanted, observe)

    ALL_EXPERTS_FUNCTIONS[name] = forward
    try:
        for config in configs.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        del ALL_EXPERTS_FUNCTIONS[name]


def _experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    wanted: dict[tuple[nn.Module, str], Layer],
    observe: Observe,
) -> Tensor:
    """The meaning of a fused experts module, expert by expert: [T, H], [T, top_k], [T, top_k] -> [T, H]."""
    top_k = top_k_index.shape[-1]
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    # ids from num_experts on mark slots that another rank serves, or none
    counts = torch.bincount(chosen, minlength=experts.num_experts)[: experts.num_experts].tolist()
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    served = []
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        tokens = order[start : start + count] // top_k
        start += count
        x = hidden_states[tokens]
        x = _project(experts, up_name, expert, x, tokens, wanted, observe)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = _project(experts, "down_proj", expert, x, tokens, wanted, observe)
        served.append(experts.post_expert_norm(x) if getattr(experts, "has_post_expert_norm", False) else x)
    if not served:
        return torch.zeros_like(hidden_states)
    slots = order[:start]
    output = torch.cat(served) * top_k_weights.reshape(-1)[slots, None]
    # scatter and then sum over top_k, as transformers does: no atomics, so the same bits every time
    spread = output.new_zeros(order.numel(), output.shape[-1]).index_copy(0, slots, output)
    return spread.view(-1, top_k, output.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _project(
    experts: Any,
    parameter: str,
    expert: int,
    x: Tensor,
    tokens: Tensor,
    wanted: dict[tuple[nn.Module, str], Layer],
    observe: Observe,
) -> Tensor:
    weight = getattr(experts, parameter)[expert]
    bias = getattr(experts, f"{parameter}_bias")[expert] if experts.has_bias else None
    output = linear(x.to(weight.dtype), weight.t() if experts.is_transposed else weight, bias)
    layer = wanted.get((experts, parameter))
    return output if layer is None else observe(layer, expert, x, tokens, output)
