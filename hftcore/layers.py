"""Find the layers of a model that can be scored and pruned.

A model of plain `nn.Linear`s needs nothing else. What another library's classes mean is told by an adapter, a module
imported when a class of that library is met in the model. An adapter has four functions:

- `linear_like(module) -> (parameter, transposed) | None`: a module that is a linear layer without being an `nn.Linear`;
- `fused_experts(model) -> [(module name, module, {parameter: transposed})]`: modules with 3-D expert weights;
  `transposed` None says that their layout is not known, and such layers are refused;
- `body(model) -> module`: the part to run when no loss and no logits are wanted (the model itself if there is no such
  part);
- `capture_experts(layers, observe)`: a context manager that calls `observe(layer, expert, x [t, N], tokens [t], output [t, M])` for
  each product of an expert and goes on with what it returns, `tokens` being row numbers of the flattened batch.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from hftcore import checks
from hftcore.errors import HftcoreError
from hftcore.shards import held

ADAPTERS = {"transformers": "hftcore.bindings.models", "peft": "hftcore.bindings.models"}
PACKED = (
    "qweight",
    "qzeros",
    "W_q",
    "weight_packed",
    "quant_state",
)  # GPTQ, AWQ, HQQ, compressed-tensors, bitsandbytes
QUANTISERS = ("bitsandbytes", "torchao", "optimum.quanto", "gptqmodel", "awq", "hqq", "aqlm")

Targets = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that multiplies an input: an `nn.Linear`, a Conv1D, a LoRA factor, or one parameter of fused experts.

    `name` keys its energy (module name, or parameter name for fused experts), `tensor` is the parameter's name in the
    model, `twins` are other modules that use the very same parameter.
    """

    name: str
    tensor: str
    module: nn.Module
    parameter: str = "weight"
    transposed: bool = False
    twins: tuple[nn.Module, ...] = ()

    @property
    def weight(self) -> Tensor:
        """[M, N] (fused experts: [E, M, N]) view of the stored weight, without its gradient history; never a copy."""
        weight = getattr(self.module, self.parameter).detach()
        return weight.transpose(-1, -2) if self.transposed else weight

    @property
    def is_fused(self) -> bool:
        return getattr(self.module, self.parameter).dim() == 3

    def matrices(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """Yield (label, weight [M, N], expert number or None), one for each matrix of the layer."""
        if not self.is_fused:
            yield self.tensor, self.weight, None
            return
        for expert, matrix in enumerate(self.weight):
            yield f"{self.tensor}[{expert}]", matrix, expert


def find_layers(model: nn.Module, targets: Targets = "all-linear", exclude: Targets | None = None) -> list[Layer]:
    """The layers that `targets` names, sorted by tensor name; a tied weight comes once.

    Args:
        targets: a string is a regular expression that must match the whole module name (PEFT's `base_layer` left
            out), a list holds names or ends of names ("mlp.up_proj"), "all-linear" is every linear layer and fused
            expert but the output head, routers and LoRA factors, "lora" is the A and B factors of the active adapters. Fused experts are
            also matched by parameter name.
        exclude: what to leave out, as a string or a list in the same sense.

    Raises:
        HftcoreError: nothing matches; or a matching layer is quantised or on the meta device.

    >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), exclude=["2"])]
    ['0']
    """
    checks.model(model)
    heads = _inside_heads(model)
    found: dict[tuple[object, ...], Layer] = {}
    names = []
    for layer in sorted(_candidates(model), key=lambda layer: layer.tensor):
        if not _wanted(layer, targets, exclude, heads, model):
            names.append(layer.name)
            continue
        weight: Any = getattr(layer.module, layer.parameter, None)
        _refuse_unusable(layer, weight)
        key = _storage(weight)
        same = found.get(key)
        if same is None:
            found[key] = layer
        elif layer.parameter != same.parameter or layer.transposed != same.transposed:
            raise HftcoreError(
                f"{layer.tensor} shares its memory with {same.tensor} in another orientation; exclude one of them"
            )
        else:
            found[key] = Layer(**{**vars(same), "twins": (*same.twins, layer.module)})
    if not found:
        shown = ", ".join(names[:: max(1, len(names) // 5)][:5]) or "none"
        raise HftcoreError(f"targets={targets!r} with exclude={exclude!r} matched no layer; available: {shown}")
    return list(found.values())


def adapters(model: nn.Module) -> list[ModuleType]:
    """The adapter modules for the libraries whose classes occur in `model`; imports them."""
    types = {type(module) for module in model.modules()}
    roots = {base.__module__.partition(".")[0] for kind in types for base in kind.__mro__}
    return [importlib.import_module(name) for name in sorted({ADAPTERS[root] for root in roots & ADAPTERS.keys()})]


def body(model: nn.Module) -> nn.Module:
    """The part of `model` to run when neither loss nor logits are wanted."""
    for adapter in adapters(model):
        model = adapter.body(model)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks: the members of the outermost `nn.ModuleList` that holds the most parameters.

    Raises:
        HftcoreError: the model has no `nn.ModuleList`.
    """
    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and module]
    if not lists:
        raise HftcoreError(
            "the model has no nn.ModuleList of blocks, so it cannot be calibrated block by block; use sequential=False"
        )
    # max keeps the first of equals, and modules() yields an outer list before the lists inside it
    return [*max(lists, key=lambda members: sum(parameter.numel() for parameter in members.parameters()))]


def _refuse_unusable(layer: Layer, weight: Any) -> None:
    kinds = (type(layer.module), type(weight), type(getattr(weight, "data", None)))
    origin = next((kind.__module__ for kind in kinds if kind.__module__.startswith(QUANTISERS)), None)
    if origin or weight is None or weight.dtype not in checks.FLOATS:
        what = "no float weight" if weight is None else str(weight.dtype)
        raise HftcoreError(
            f"layer {layer.name!r} is quantised or of an unsupported dtype ({origin or what}); weights must be float32, "
            "bfloat16 or float16: load the model without quantisation, or exclude the layer"
        )
    if id(weight) != id(layer.module._parameters.get(layer.parameter)):
        raise HftcoreError(
            f"layer {layer.name!r} computes its {layer.parameter} (a parametrisation such as weight_norm), so a change to it would be "
            "lost; remove the parametrisation or exclude the layer"
        )
    if layer.transposed is None:
        raise HftcoreError(
            f"layer {layer.name!r} is fused experts of an unknown layout ({type(layer.module).__name__}); exclude it"
        )
    if weight.is_meta:
        raise HftcoreError(
            f"layer {layer.name!r} is on the meta device (offloaded or not loaded); load it onto a real device first"
        )


def _storage(weight: Tensor) -> tuple[object, ...]:
    """What two parameters that are one weight have in common, whether they are one object or not."""
    local = held(weight)  # a DTensor's own address is 0
    return (weight.device, local.data_ptr(), weight.numel()) if local.numel() else (id(weight),)


def _candidates(model: nn.Module) -> Iterator[Layer]:
    known = adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or any(hasattr(module, packed) for packed in PACKED):
            yield Layer(name, _join(name, "weight"), module)
        else:
            for adapter in known:
                if found := adapter.linear_like(module):
                    yield Layer(name, _join(name, found[0]), module, *found)
                    break
    for adapter in known:
        for name, module, parameters in adapter.fused_experts(model):
            for parameter, transposed in parameters.items():
                yield Layer(_join(name, parameter), _join(name, parameter), module, parameter, transposed)


def _wanted(layer: Layer, targets: Targets, exclude: Targets | None, heads: set[nn.Module], model: nn.Module) -> bool:
    if exclude is not None and _matches(layer, exclude):
        return False
    if targets == "lora":
        return _is_factor(layer.name) and _is_active(layer.name, model)
    if targets == "all-linear":
        return layer.module not in heads and not _is_factor(layer.name) and not _is_router(layer, model)
    return _matches(layer, targets)


def _matches(layer: Layer, targets: Targets) -> bool:
    names = {layer.name, layer.name.removesuffix("." + layer.parameter), layer.name.removesuffix(".base_layer")}
    names |= {name.removeprefix("base_model.model.") for name in names}
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise HftcoreError(
                f"targets and exclude must be regular expressions or lists of names, got {targets!r}: {error}"
            ) from error
        return any(pattern.fullmatch(name) for name in names)
    ends = tuple(f".{target}" for target in targets)
    return any(f".{name}".endswith(ends) for name in names)


def _is_factor(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _is_active(name: str, model: nn.Module) -> bool:
    """Whether a LoRA factor `….lora_A.<adapter>` belongs to an adapter in use; others see no token."""
    *parent, _, adapter = name.split(".")
    active = getattr(model.get_submodule(".".join(parent)), "active_adapters", None) if parent else None
    return active is None or adapter in active


def _is_router(layer: Layer, model: nn.Module) -> bool:
    """Whether a linear layer chooses experts: by its class name, or as a gate beside a child called `experts`."""
    if "Router" in type(layer.module).__name__:
        return True
    parent, _, last = layer.name.rpartition(".")
    is_named_so = "gate" in last or "router" in last
    return is_named_so and hasattr(model.get_submodule(parent), "experts")


def _inside_heads(model: nn.Module) -> set[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return set(head.modules()) if isinstance(head, nn.Module) else set()


def _join(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter
