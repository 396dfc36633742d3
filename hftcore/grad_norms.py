"""Per-sample gradient norms from one ordinary backward pass, without per-sample gradients."""

import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hftcore import ops
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.grad_rules import Conv1DRule, EmbeddingRule, LinearRule, Rule, find_rules
from hftcore.kernels import gradients
from hftcore.layers import body
from hftcore.ops.gradients import embedding_grad_norms_sq, grad_norms_sq

LOSSES = ("mean", "sum", "share")
PASSES = 48  # operations of a matrix product in the time that one element of a product is squared, added and stored


@contextmanager
def capture_grad_norms(
    model: nn.Module, loss: str = "mean", norms_only: bool = False, keep: bool = False, loss_scale: float = 1.0
) -> Iterator["GradNorms"]:
    """Yield a `GradNorms` that holds, after one forward and one backward pass of `model` inside the block, each sample's norms.

    The gradient is that over all parameters that require one, of the sample's own loss. The batch's loss is taken to be the one
    transformers' causal language models give: the sum over supervised tokens divided by their number in the batch (or by
    `num_items_in_batch`, if the model was given it). `param.grad` is filled as ever, equal to the plain one up to rounding. Samples must
    not influence each other (no batch statistics, no sequences packed across rows). Gradient checkpointing of both kinds, modules
    called more than once, tied embeddings and LoRA factors are right; the frozen weights under LoRA do not count. Every hook is gone at
    the end, also after an exception.

    Args:
        loss: of which loss of a sample the gradient is: "mean" over its own supervised tokens; their "sum"; or its "share" of the
            batch's loss, whatever that loss is. "mean" and "sum" need the model to be called with `labels` (or `shift_labels`).
        norms_only: `param.grad` stays as it is, and no gradient of a matrix is computed.
        keep: keep inputs and output gradients until the `GradNorms` is dropped, which `norms.backward(weights)` needs.
        loss_scale: what the loss was multiplied by before its backward pass (a GradScaler's scale, or 1 / accumulation steps).

    Raises:
        HftcoreError: a trained parameter of a kind whose per-sample gradients are not known (by name); a second forward pass in the
            block; no backward pass in it; labels missing; a module that does not see one row for each sample.
        NonFiniteError: a norm is NaN or infinite (parameter and sample by name).

    Source: Goodfellow 2015 (arXiv:1510.01799); Li et al. 2022 (arXiv:2110.05679); Bu et al. 2023 (arXiv:2210.00038) for sums weighted
    from what the one backward pass saw.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with capture_grad_norms(layer, loss="share") as norms:
    ...     layer(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
    >>> norms.per_sample
    tensor([5., 1.])
    """
    if loss not in LOSSES:
        raise HftcoreError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not loss_scale > 0:
        raise HftcoreError(f"loss_scale must be positive, got {loss_scale}")
    norms = GradNorms(find_rules(model), loss, norms_only, keep, float(loss_scale))
    with norms._hooked(model):
        yield norms
    norms._finish()


class GradNorms:
    """The norms of each sample's gradient; see `capture_grad_norms`."""

    def __init__(self, rules: list[Rule], loss: str, norms_only: bool, keep: bool, loss_scale: float):
        self._rules = rules
        self._loss = loss
        self._norms_only = norms_only
        self._keep = keep
        self._loss_scale = loss_scale
        self._squares: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._waiting: dict[str, list[tuple[Rule, Tensor, Tensor]]] = {}
        self._calls: dict[str, int] = {}
        self._ids: dict[str, list[Tensor]] = {}
        self._heads: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: list[tuple[Rule, Tensor, Tensor]] = []
        self._touched: set[str] = set()
        self._gram: tuple[Tensor, int, Tensor] | None = None
        self._inputs: Mapping[str, Any] = {}
        self._batch: tuple[int, int] = (0, 0)
        self._depth = 0
        self._is_open = False
        self._is_evaluation = False

    @property
    def per_sample(self) -> Tensor:
        """[B] float32: the norm of each sample's gradient over all trained parameters."""
        return torch.stack(list(self._scaled_squares().values())).sum(dim=0).sqrt()

    @property
    def per_parameter(self) -> dict[str, Tensor]:
        """Parameter name -> [B] float32; the squares add up to that of `per_sample`. Tied weights are one parameter."""
        return {name: square.sqrt() for name, square in self._scaled_squares().items()}

    def backward(self, weights: Tensor) -> None:
        """Add the weighted sum of the samples' gradients, Σ_b weights[b] g_b, to `param.grad`, without another backward pass.

        g_b is the gradient whose norm is `per_sample[b]`. Use with `norms_only=True`, or zero the gradients first: what the ordinary
        backward pass left in `param.grad` stays there.

        Args:
            weights: [B], any real dtype, finite.

        Raises:
            HftcoreError: `keep=True` was not asked for, or weights of another shape; no gradient has been changed then.
        """
        if not self._keep:
            raise HftcoreError("norms.backward needs capture_grad_norms(model, keep=True): inputs were not kept")
        self._scaled_squares()
        if weights.shape != (self._batch[0],) or not bool(weights.isfinite().all()):
            raise HftcoreError(f"weights must be finite, of shape ({self._batch[0]},), got {weights}")
        for rule, x, g in self._kept:
            factor = (weights.to(g.device).double() * self._scale(g.device)).to(_wide(g))
            weighted = g.to(factor.dtype) * factor[:, None, None]
            found = {own: vector.sum(dim=0) for own, vector in rule.vectors(x, weighted).items()}
            if rule.matrix in rule.parameters:
                found[rule.matrix] = rule.gradient(x, weighted)
            for own, value in found.items():
                parameter = rule.parameter(own)
                value = value.to(parameter.dtype)
                parameter.grad = value if parameter.grad is None else parameter.grad.add_(value)

    @contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, self, "_is_open", False)
            self._is_open = True
            for root in {model, body(model)}:
                stack.callback(root.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True).remove)
                stack.callback(root.register_forward_hook(self._leave, always_call=True).remove)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(partial(self._touch, name)).remove)
            for rule in self._rules:
                trained = [rule.parameter(own) for own in rule.parameters]
                # the tap computes the gradient of a linear weight itself, along with the norms
                hidden = trained if self._norms_only else []
                if not self._norms_only and isinstance(rule, LinearRule) and "weight" in rule.parameters:
                    hidden = [rule.parameter("weight")]
                stack.callback(_set_requires_grad, hidden, True)
                hide = lambda module, args, hidden=hidden: _set_requires_grad(hidden, False)  # noqa: E731
                stack.callback(rule.module.register_forward_pre_hook(hide).remove)
                see = partial(self._see, rule, hidden)
                stack.callback(rule.module.register_forward_hook(see, with_kwargs=True, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or _is_backward():
            return
        # a pass without gradients (an evaluation) is nobody's business here
        self._is_evaluation = not torch.is_grad_enabled()
        if self._is_evaluation:
            return
        if self._inputs:
            raise HftcoreError(
                "the model was called a second time in one capture_grad_norms block; open a block for each batch"
            )
        names = inspect.signature(module.forward).parameters
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [inputs.get("input_ids"), inputs.get("inputs_embeds"), *inputs.values()]
        x = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
        if x is None:
            raise HftcoreError(f"the model must be called with a tensor such as input_ids, got {sorted(inputs)}")
        self._batch = (x.shape[0], x.shape[1] if x.dim() > 1 + x.is_floating_point() else 1)
        self._inputs = inputs
        self._counts()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._is_evaluation = False

    def _counts(self) -> Tensor | None:
        """[B] supervised tokens; None when the loss is taken as it is."""
        if self._loss == "share":
            return None
        shifted = self._inputs.get("shift_labels")
        labels = self._inputs.get("labels") if shifted is None else shifted
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != self._batch[0]:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise HftcoreError(
                f'loss="{self._loss}" needs the model to be called with labels of shape {list(self._batch)}, got {got}; '
                'for another loss take loss="share"'
            )
        return ((labels if shifted is not None else labels[:, 1:]) != -100).sum(dim=1)

    def _scale(self, device: torch.device) -> Tensor:
        """[B] float64: by what the sample's share of the batch's gradient is multiplied."""
        scale = torch.full((self._batch[0],), 1 / self._loss_scale, dtype=torch.float64, device=device)
        counts = self._counts()
        if counts is None:
            return scale
        counts = counts.to(device).double()
        total = self._inputs.get("num_items_in_batch")
        scale *= counts.sum() if total is None else float(total)
        return scale.masked_fill(counts == 0, 0) if self._loss == "sum" else scale * (counts > 0) / counts.clamp(min=1)

    def _see(self, rule: Rule, hidden: Sequence[Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        _set_requires_grad(hidden, True)
        if output is None or not self._is_open:
            return None
        is_again = _is_backward()  # gradient checkpointing runs blocks again inside the backward pass
        if not is_again and self._is_evaluation:
            return None
        if not self._inputs:
            raise HftcoreError(
                f"module {rule.name!r} was called outside a forward pass of the model; call the model itself"
            )
        if (
            not is_again
        ):  # reentrant checkpointing switches gradients off the first time, and the call counts all the same
            for name in rule.parameters.values():
                self._calls[name] = self._calls.get(name, 0) + 1
        if not torch.is_grad_enabled():
            return None
        x, factor = rule.inputs(args, kwargs)
        if isinstance(rule, EmbeddingRule):
            x, output = self._broadcast(x, output)
            if not is_again:
                self._ids.setdefault(rule.parameters["weight"], []).append(x)
        self._check_rows(rule, x)
        return _Tap.apply(self, rule, x, factor, output, *(rule.parameter(own) for own in rule.parameters))

    def _broadcast(self, ids: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Positions shared by the batch get one row for each sample, which what they are added to has anyway."""
        B, T = self._batch
        if B > 1 and ids.dim() == 2 and ids.shape[0] == 1:
            return ids.expand(B, -1), output.expand(B, -1, -1)
        if B > 1 and ids.dim() == 1 and len(ids) == T != B:
            return ids.expand(B, -1), output.expand(B, -1, -1)
        return ids, output

    def _check_rows(self, rule: Rule, x: Tensor) -> None:
        B, T = self._batch
        if x.shape[0] not in (B, B * T):
            raise HftcoreError(
                f"module {rule.name!r} saw an input of shape {tuple(x.shape)}, which has neither B = {B} nor B T = {B * T} rows, "
                "so rows cannot be told apart by sample; freeze its parameters"
            )

    def _touch(self, name: str, grad: Tensor | None) -> None:
        if grad is not None:
            self._touched.add(name)

    def _record(self, rule: Rule, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Take the pair of one call; returns the gradients of the rule's parameters, None where autograd forms them."""
        B = self._batch[0]
        x = x.reshape(B, -1) if isinstance(rule, EmbeddingRule) else x.reshape(B, -1, x.shape[-1])
        g = g.reshape(B, -1, g.shape[-1])
        if self._keep:
            self._kept.append((rule, x, g))
        for own, vector in rule.vectors(x, g).items():
            name = rule.parameters[own]
            self._vectors[name] = self._vectors[name] + vector if name in self._vectors else vector
        gradient = None
        if rule.matrix in rule.parameters:
            gradient = self._record_matrix(rule, rule.parameters[rule.matrix], x, g)
        return tuple(gradient if own == rule.matrix else None for own in rule.parameters)

    def _record_matrix(self, rule: Rule, name: str, x: Tensor, g: Tensor) -> Tensor | None:
        wants_gradient = isinstance(rule, LinearRule) and not self._norms_only
        calls, ids = self._calls.get(name, 0), self._ids.get(name, ())
        if calls == 2 and len(ids) == 1 and name not in self._waiting:
            if isinstance(rule, LinearRule):
                # of the head's gradient the embedding needs no more than the columns it looked up
                at = ids[0].reshape(self._batch[0], 1, -1).expand(-1, g.shape[1], -1)
                self._heads[name] = x, g.gather(2, at)
                return self._record_linear(rule, name, x, g, wants_gradient)
            if isinstance(rule, EmbeddingRule) and name in self._heads:
                of_head = self._squares[name]
                self._squares[name] = _tied(of_head, *self._heads.pop(name), x, g, rule.padding_idx)
                return None
        if calls > 1:
            waiting = self._waiting.setdefault(name, [])
            waiting.append((rule, x, g))
            if len(waiting) == calls:
                self._combine(name)
            return rule.gradient(x, g) if wants_gradient else None
        if isinstance(rule, EmbeddingRule):
            self._squares[name] = embedding_grad_norms_sq(x, g, rule.padding_idx)
            return None
        return self._record_linear(rule, name, x, g, wants_gradient)

    def _record_linear(self, rule: Rule, name: str, x: Tensor, g: Tensor, wants_gradient: bool) -> Tensor | None:
        if wants_gradient and _is_direct_with_gradient(x, g):
            left, right = (g, x) if isinstance(rule, Conv1DRule) else (x, g)
            self._squares[name], gradient = gradients.direct_with_gradient(left, right)
            return gradient
        self._squares[name] = self._linear(x, g)
        return rule.gradient(x, g) if wants_gradient else None

    def _linear(self, x: Tensor, g: Tensor) -> Tensor:
        T, N = x.shape[1:]
        # on a GPU the kernel keeps the Gram matrix on chip, and making it anew costs less than storing it
        if x.device.type != "cpu" or T > N or not gradients.is_ghost(T, g.shape[2], N):
            return grad_norms_sq(x, g)
        kept = self._gram
        if kept is None or kept[0].data_ptr() != x.data_ptr() or kept[0].shape != x.shape or kept[1] != x._version:
            # the input is held with its Gram matrix, so that no other tensor can come to lie where it was
            kept = self._gram = (x, x._version, ops.gradients.input_gram(x))
        return grad_norms_sq(x, g, kept[2])

    def _combine(self, name: str) -> None:
        """The norm over several calls: calls follow one another as more tokens of a sample would."""
        records = self._waiting.pop(name)
        linear = [(x, g) for rule, x, g in records if isinstance(rule, LinearRule)]
        looked_up = [(x, g, rule.padding_idx) for rule, x, g in records if isinstance(rule, EmbeddingRule)]
        if linear:
            x, g = (torch.cat(parts, dim=1) for parts in zip(*linear, strict=True))
            square = grad_norms_sq(x, g)
        if looked_up:
            ids = torch.cat([part[0] for part in looked_up], dim=1)
            of_rows = torch.cat([part[1] for part in looked_up], dim=1)
            padding = looked_up[0][2]
            if linear:
                at_ids = g.gather(2, ids.unsqueeze(1).expand(-1, g.shape[1], -1))
                square = _tied(square, x, at_ids, ids, of_rows, padding)
            else:
                square = embedding_grad_norms_sq(ids, of_rows, padding)
        self._squares[name] = square

    def _finish(self) -> None:
        self._gram = None
        self._heads.clear()
        for name in list(self._waiting):
            self._combine(name)
        unseen = sorted(self._touched - self._squares.keys() - self._vectors.keys())
        if unseen or (self._norms_only and self._touched):
            raise HftcoreError(
                f"parameter {(unseen or sorted(self._touched))[0]!r} got a gradient from outside the forward pass of its module, "
                "which its norm would miss; freeze it"
            )
        squares = self._scaled_squares()
        for name, square in squares.items():
            if not bool(square.isfinite().all()):
                sample = int((~square.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"the gradient of parameter {name!r} is NaN or infinite for sample {sample}; look at the loss and the data"
                )
        counts = self._counts()
        if counts is not None and bool((counts == 0).any()):
            empty = (counts == 0).nonzero().flatten().tolist()
            warnings.warn(f"samples {empty} have no supervised token (all labels -100): their norm is 0", stacklevel=3)

    def _scaled_squares(self) -> dict[str, Tensor]:
        if not self._squares and not self._vectors:
            raise HftcoreError("no backward pass ran in the capture_grad_norms block; call loss.backward() inside it")
        vectors = {name: vector.square().sum(dim=1) for name, vector in self._vectors.items()}
        squares = {**self._squares, **vectors}
        device = next(iter(squares.values())).device
        scale = self._scale(device).square()
        names = dict.fromkeys(name for rule in self._rules for name in rule.parameters.values())
        none = torch.zeros(self._batch[0], device=device)
        return {name: (squares.get(name, none).to(device).double() * scale).float() for name in names}


class _Tap(torch.autograd.Function):
    """The identity on a module's output; its backward pass hands the module's input and output gradient over.

    As autograd pairs them itself, they fit whatever gradient checkpointing runs again, and however often a module is called.
    """

    @staticmethod
    def forward(
        ctx: Any, norms: GradNorms, rule: Rule, x: Tensor, factor: float | Tensor, output: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norms, ctx.rule, ctx.factor = weakref.ref(norms), rule, factor
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        norms, rule = ctx.norms(), ctx.rule
        none = (None,) * len(rule.parameters)
        if norms is None or not norms._is_open:
            raise HftcoreError("the backward pass must run inside the capture_grad_norms block of its forward pass")
        (x,) = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False), torch.no_grad():
            own = norms._record(rule, x.detach(), g if isinstance(ctx.factor, float) else g * ctx.factor)
        return None, None, None, None, g, *(own or none)


def _tied(of_head: Tensor, x: Tensor, at_ids: Tensor, ids: Tensor, of_rows: Tensor, padding: int | None) -> Tensor:
    """The squared norm of one matrix that is both head and embedding, from that of its part as the head."""
    if padding is not None:
        of_rows = of_rows.masked_fill((ids == padding).unsqueeze(-1), 0)
    cross = gradients.tied_cross(x, at_ids, of_rows)
    return (of_head + embedding_grad_norms_sq(ids, of_rows) + 2 * cross).clamp(min=0)


def _is_direct_with_gradient(x: Tensor, g: Tensor) -> bool:
    """Whether one product for norm and gradient costs less than the ghost form beside an ordinary product."""
    T, M, N = x.shape[1], g.shape[2], x.shape[2]
    return x.device.type == "cpu" and T * T * (M + N) > PASSES * M * N


def _set_requires_grad(parameters: Sequence[Tensor], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
