"""Measure the input energy of layers while a model runs, without changing the model or what it computes."""

import inspect
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hftcore import ops
from hftcore.energy import Energy, check_average
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.layers import Layer, Targets, adapters, body, find_layers


@contextmanager
def capture_energy(
    model: nn.Module,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    tokens: str = "all",
    average: str = "sum",
) -> Iterator[Energy]:
    """Yield an Energy that grows with every forward pass of `model` until the block ends.

    The model computes what it computed before (fused experts are run one by one, equal up to rounding), and every
    hook is gone at the end, also after an exception. What counts is what layers see inside a forward pass of `model`
    or of its body that succeeds: a pass that fails adds nothing, and blocks that gradient checkpointing runs again in
    the backward pass are not counted twice.

    Args:
        targets, exclude: which layers, see `find_layers`.
        tokens: "all" counts every token that `attention_mask` does not mark as padding; "response" counts of these
            the positions whose label is not -100 (Wei et al. 2024), so each forward pass must be given `labels`.
        average: "sum", the sum over all counted tokens (as Wanda's and Antidote's code ranks); or "sample-norm", the
            square of the mean over samples of each sample's own norm (eq. 1 of Antidote as printed), final only when
            the block ends.

    Raises:
        HftcoreError: nothing matches; a layer is quantised; a layer sees other tokens than the mask speaks of while
            some are masked; layers were called by hand, outside a forward pass of the model.
        NonFiniteError: a layer's input holds NaN or infinity, or its energy overflows float32.

    Source: the statistic of Sun et al. 2023 (arXiv:2306.11695), summed and not averaged, so that runs can be merged.

    >>> layer = nn.Linear(2, 1)
    >>> with capture_energy(layer) as energy:
    ...     _ = layer(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    >>> energy[""], energy.tokens
    (tensor([25.,  2.]), 2)
    """
    meter = Meter(find_layers(model, targets, exclude), tokens, average)
    with meter.hooked(model), meter.following(model):
        yield meter.energy
        meter.finish()


class Meter:
    """Adds up the energies of `layers`; what a pass over one batch saw counts when the pass reaches its `end`."""

    def __init__(self, layers: Sequence[Layer], tokens: str = "all", average: str = "sum"):
        if tokens not in ("all", "response"):
            raise HftcoreError(f'tokens must be "all" or "response", got {tokens!r}')
        check_average(average)
        self.fused = [layer for layer in layers if layer.is_fused]
        if self.fused and average == "sample-norm":
            name = self.fused[0].name
            raise HftcoreError(
                f'average="sample-norm" is not defined for fused experts ({name}); use "sum" or exclude them'
            )
        self.layers = layers
        self.tokens = tokens
        self.energy = Energy({layer.name: _zeros(layer) for layer in layers}, average=average)
        for layer in self.fused:
            self.energy.expert_tokens[layer.name] = _zeros(layer)[:, 0].long()
        self.stray = ""
        self.depth = 0
        self.mask: Tensor | None = None
        self._forget()

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Start a pass over a batch; `inputs` are the arguments of the model's forward by name."""
        self._forget()
        mask, self.shape = token_mask(inputs, self.tokens)
        # all ones need no mask, which lets layers see tokens in any arrangement
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.active = True

    def end(self) -> None:
        """Add what the pass saw.

        Raises:
            NonFiniteError: an energy is not finite; nothing of the pass is added.
        """
        _check_finite(self.seen)
        for name, value in self.seen.items():
            self.energy.add_(name, value)
        for name, count in self.routed.items():
            self.energy.expert_tokens[name] += count
        if self.mask is None:
            self.energy.tokens += math.prod(self.shape)
            self.energy.samples += self.shape[0]
        else:
            self.energy.tokens += int(self.mask.sum())
            self.energy.samples += int(self.mask.any(dim=1).sum())
        self._forget()

    def finish(self) -> None:
        """Turn sums of per-sample norms into the energy they stand for.

        Raises:
            HftcoreError: a layer was called outside every pass.
        """
        if self.stray:
            raise HftcoreError(
                f"layer {self.stray!r} was called outside a forward pass of the model; call the model itself"
            )
        if self.energy.average == "sample-norm":
            for value in self.energy.values():
                value.div_(max(1, self.energy.samples)).square_()

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Watch the inputs of the layers."""
        with ExitStack() as stack:
            for layer in self.layers:
                for module in () if layer.is_fused else (layer.module, *layer.twins):
                    hook = partial(self._observe, layer.name)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if self.fused:
                for adapter in adapters(model):
                    stack.enter_context(adapter.capture_experts(self.fused, self._observe_expert))
            yield

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Make every forward pass of the model, or of its body alone, a pass."""
        with ExitStack() as stack:
            for module in {model, body(model)}:
                stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth == 1:
            names = inspect.signature(module.forward).parameters
            self.begin({**dict(zip(names, args, strict=False)), **kwargs})

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.depth -= 1
        if self.depth == 0 and output is not None:
            self.end()
        elif self.depth == 0:
            self._forget()  # torch hands over None when the forward raised

    def _forget(self) -> None:
        self.active = False
        self.mask = None
        self.shape = (0, 0)
        self.seen: dict[str, Tensor] = {}
        self.routed: dict[str, Tensor] = {}
        self.reduced: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_inside(name):
            value = self._reduce(name, args[0] if args else next(iter(kwargs.values())))
            have = self.seen.get(name)
            self.seen[name] = value if have is None else have + value

    def _observe_expert(self, layer: Layer, expert: int, x: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        if not self._is_inside(layer.name):
            return output
        if layer.name not in self.seen:
            self.seen[layer.name] = _zeros(layer)
            self.routed[layer.name] = torch.zeros_like(self.energy.expert_tokens[layer.name])
        keep = None if self.mask is None else self.mask.to(x.device).reshape(-1)[tokens]
        self.seen[layer.name][expert] += ops.column_energy(x.detach(), keep)
        self.routed[layer.name][expert] += x.shape[0] if keep is None else keep.sum()
        return output

    def _is_inside(self, name: str) -> bool:
        # a backward pass runs layers again only for gradient checkpointing, and they were counted the first time
        if not self.active and torch._C._current_graph_task_id() == -1:
            self.stray = name
        return self.active

    def _reduce(self, name: str, x: Tensor) -> Tensor:
        """Energy of one input; the very same tensor, unchanged since, is reduced once for all layers it goes to."""
        # inference tensors do not tell whether they were changed
        version = -1 if x.is_inference() else x._version
        seen, at, value = self.reduced.get(id(x), (None, 0, x))
        if seen is not None and seen() is x and at == version != -1:
            return value
        value = self._measure(name, x.detach())
        self.reduced[id(x)] = weakref.ref(x), version, value
        return value

    def _measure(self, name: str, x: Tensor) -> Tensor:
        per_sample = self.energy.average == "sample-norm"
        if self.mask is None and not per_sample:
            return ops.column_energy(x)
        leading = tuple(x.shape[:-1])
        # flattened, or with axes of length 1 between, as latent attention has them
        if leading != (math.prod(self.shape),) and _thin(leading) != _thin(self.shape):
            raise HftcoreError(
                f"layer {name!r} saw tokens of shape {leading} where the token mask has {self.shape}; "
                'exclude it, or use batches without padding and tokens="all"'
            )
        mask = torch.ones(self.shape, dtype=torch.bool) if self.mask is None else self.mask
        mask = mask.to(x.device)
        if not per_sample:
            return ops.column_energy(x, mask.reshape(leading))
        rows = x.reshape(*self.shape, x.shape[-1])
        return torch.stack([ops.column_energy(*sample).sqrt() for sample in zip(rows, mask, strict=True)]).sum(dim=0)


def token_mask(inputs: Mapping[str, Any], tokens: str) -> tuple[Tensor | None, tuple[int, int]]:
    """Which tokens of a batch count, as [B, T] bool (None: all of them), and (B, T).

    Raises:
        HftcoreError: no tensor to count; an attention mask that is not [B, T]; labels missing or of another shape.
    """
    given = [inputs.get("input_ids"), inputs.get("inputs_embeds"), *inputs.values()]
    x = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
    if x is None:
        raise HftcoreError(f"a batch must hold a tensor such as input_ids, got {sorted(inputs)}")
    leading = x.shape[:-1] if x.is_floating_point() else x.shape
    # rows without a batch axis are one sample
    shape = (leading[0], math.prod(leading[1:])) if len(leading) > 1 else (1, math.prod(leading))
    mask = inputs.get("attention_mask")
    if mask is not None:
        # while generating, the mask also speaks of cached tokens, which come first
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]
        if not fits:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise HftcoreError(f"attention_mask must be [B, T] = {list(shape)}, got {got}")
        mask = mask[:, mask.shape[1] - shape[1] :] != 0
    if tokens == "response":
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or tuple(labels.shape) != shape:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise HftcoreError(
                f'tokens="response" needs labels of shape {list(shape)} with -100 outside the response, got {found}'
            )
        response = labels != -100
        mask = response if mask is None else mask.to(response.device) & response
    return mask, shape


def _check_finite(seen: Mapping[str, Tensor]) -> None:
    if not seen:
        return
    # one transfer for all layers: the largest value is NaN or infinite where any value is
    device = next(iter(seen.values())).device
    peaks = torch.stack([value.amax().to(device) for value in seen.values()]).tolist()
    for (name, value), peak in zip(seen.items(), peaks, strict=True):
        if not math.isfinite(peak):
            feature = int((~value.isfinite()).nonzero()[0, -1])
            raise NonFiniteError(
                f"the input of layer {name!r} holds NaN or infinity, or overflows when squared, in feature {feature}; "
                "look at the model and the data"
            )


def _thin(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _zeros(layer: Layer) -> Tensor:
    weight = layer.weight
    return torch.zeros((*weight.shape[:-2], weight.shape[-1]), dtype=torch.float32, device=weight.device)
