"""Hooks that show a ledger the input and the output gradient of every call of a model's trained modules."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hftcore.errors import HftcoreError
from hftcore.grad_experts import ExpertsRule, Pool, by_sample
from hftcore.grad_find import find_rules
from hftcore.grad_inputs import faster_inputs
from hftcore.grad_ledger import Ledger
from hftcore.grad_loss import SampleLoss
from hftcore.grad_rules import EmbeddingRule, LinearRule, RouterRule, Rule
from hftcore.layers import Layer, adapters, body
from hftcore.shards import is_sharded


@dataclass(eq=False)
class Call:
    """One call of a module, or of one expert; `tokens` are the rows of the flattened batch that the expert saw."""

    rule: Rule
    tokens: Tensor | None = None
    pool: Pool | None = None


class Watch:
    """Lets a model run as ever, its weights' gradients formed by the ledger along with the norms (or, for norms only, not at all)."""

    def __init__(self, model: nn.Module, loss: SampleLoss, ledger: Ledger):
        self.model = model
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.trained = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
        self.modules = dict(model.named_modules())
        self.rules = find_rules(model, self.modules, names)
        self.loss = loss
        self.ledger = ledger
        self.touched: set[str] = set()
        self.is_open = False
        self._depth = 0
        self._is_evaluation = False
        self._pools: dict[Layer, Pool] = {}
        self._tied = self._matrices(EmbeddingRule) & self._matrices(LinearRule)

    def _matrices(self, kind: type[Rule]) -> set[str]:
        return {name for rule in self.rules if isinstance(rule, kind) for name in rule.parameters.values()}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, self, "is_open", False)
            self.is_open = True
            for root in {self.model, body(self.model)}:
                stack.callback(root.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True).remove)
                stack.callback(root.register_forward_hook(self._leave, always_call=True).remove)
            for name, parameter in self.trained.items():
                stack.callback(parameter.register_hook(partial(self._touch, name)).remove)
            for rule in self.rules:
                stack.callback(self._show, rule)
                hide = lambda module, args, rule=rule: self._hide(rule)  # noqa: E731
                stack.callback(rule.module.register_forward_pre_hook(hide).remove)
                if isinstance(rule, RouterRule):
                    stack.enter_context(self._inside(rule))
                see = partial(self._see, rule)
                # before FSDP2's own hook takes the gathered weights away
                stack.callback(
                    rule.module.register_forward_hook(see, prepend=True, with_kwargs=True, always_call=True).remove
                )
            experts = {rule.layer: rule for rule in self.rules if isinstance(rule, ExpertsRule)}
            for adapter in adapters(self.model) if experts else ():
                stack.enter_context(adapter.capture_experts(list(experts), partial(self._see_expert, experts)))
            stack.enter_context(faster_inputs(self.modules.values()))
            yield

    def _hide(self, rule: Rule) -> None:
        """The module itself must compute no gradient of these parameters: the ones it has now, for FSDP2 swaps them."""
        for parameter in self._hidden(rule):
            if is_sharded(parameter):
                raise HftcoreError(
                    f"the weights of module {rule.name!r} are DTensors while it runs, as tensor parallelism leaves them, and per-sample "
                    "gradients are known of whole ones; use fully_shard (FSDP2) or DistributedDataParallel"
                )
            parameter.requires_grad_(False)

    def _show(self, rule: Rule) -> None:
        for parameter in self._hidden(rule):
            parameter.requires_grad_(True)

    def _hidden(self, rule: Rule) -> list[nn.Parameter]:
        # a lookup's gradient is one pass over the rows for autograd, which does it well
        own = () if isinstance(rule, EmbeddingRule) and not self.ledger.norms_only else rule.parameters
        return [rule.parameter(name) for name in own]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or _is_backward():
            return
        # a pass without gradients (an evaluation) is nobody's business here
        self._is_evaluation = not torch.is_grad_enabled()
        if self._is_evaluation:
            return
        if self.loss.is_known:
            raise HftcoreError(
                "the model was called a second time in one capture_grad_norms block; open a block for each batch"
            )
        self.loss.take(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._is_evaluation = False

    def _is_counted(self, rule: Rule) -> bool:
        """Whether a call that is running belongs to the pass; the forward pass's own calls are noted with the ledger."""
        if not self.is_open or (self._is_evaluation and not _is_backward()):
            return False
        if not self.loss.is_known:
            raise HftcoreError(
                f"module {rule.name!r} was called outside a forward pass of the model; call the model itself"
            )
        return True

    def _see(self, rule: Rule, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._show(rule)
        if isinstance(rule, ExpertsRule):
            self._pools.pop(rule.layer, None)
            return None
        if output is None or isinstance(rule, RouterRule) or not self._is_counted(rule):
            return None
        if isinstance(rule, EmbeddingRule):
            # reentrant checkpointing switches gradients off the first time, and the call counts all the same
            x, factor = rule.inputs(args, kwargs)
            x, output = self._broadcast(rule, x, output)
            return self._tap(Call(rule), x, factor, output, x)
        x, factor = rule.inputs(args, kwargs)
        return self._tap(Call(rule), x, factor, output)

    @contextmanager
    def _inside(self, rule: RouterRule) -> Iterator[None]:
        """See the one linear map in a module that does more."""
        inner: list[_LinearMode] = []

        def tap(x: Tensor, output: Tensor) -> Tensor:
            if not self._is_counted(rule):
                return output
            self._show(rule)
            seen = self._tap(Call(rule), x, 1.0, output)
            self._hide(rule)
            return seen

        def begin(module: nn.Module, args: Any) -> None:
            inner.append(_LinearMode(rule.parameter("weight"), tap))
            inner[-1].__enter__()

        def end(module: nn.Module, args: Any, output: Any) -> None:
            mode = inner.pop()
            mode.__exit__(None, None, None)
            if output is not None and mode.seen != 1:
                raise HftcoreError(
                    f"per-sample gradients of module {rule.name!r} ({type(module).__name__}) are not known: it used its weight in "
                    f"{mode.seen} linear maps instead of one; freeze its parameters"
                )

        before, after = (
            rule.module.register_forward_pre_hook(begin),
            rule.module.register_forward_hook(end, always_call=True),
        )
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _see_expert(
        self, experts: dict[Layer, ExpertsRule], layer: Layer, expert: int, x: Tensor, tokens: Tensor, output: Tensor
    ) -> Tensor:
        rule = experts[layer].of(expert)
        if not self._is_counted(rule):
            return output
        rows = self.loss.samples * self.loss.tokens
        if bool((tokens >= rows).any()):
            raise HftcoreError(
                f"experts {rule.name!r} saw token {int(tokens.max())} of a batch of B T = {rows}, so rows cannot be told apart by "
                "sample; freeze their parameters"
            )
        self._show(rule)
        pool = self._pools.setdefault(layer, Pool())
        pool.open += 1
        seen = self._tap(Call(rule, tokens, pool), x, 1.0, output)
        self._hide(rule)
        return seen

    def _tap(self, call: Call, x: Tensor, factor: float | Tensor, output: Tensor, ids: Tensor | None = None) -> Tensor:
        if not _is_backward():
            self.ledger.expect(call.rule, ids)
        if not torch.is_grad_enabled():
            return output
        if call.tokens is None:
            self._check_rows(call.rule, x)
        parameters = [call.rule.parameter(own) for own in call.rule.parameters]
        return _Tap.apply(weakref.ref(self), call, x, factor, output, *parameters)

    def _broadcast(self, rule: Rule, ids: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Positions shared by the batch get one row for each sample, which what they are added to has anyway."""
        B, T = self.loss.samples, self.loss.tokens
        if ids.dim() == 1 and len(ids) == B == T > 1:
            raise HftcoreError(
                f"embedding {rule.name!r} looked up {B} rows without a batch axis where B = T = {B}, so they could be samples or "
                "positions; call the model with a batch of another size"
            )
        if B > 1 and (ids.shape[0] == 1 if ids.dim() == 2 else ids.dim() == 1 and len(ids) == T):
            return ids.expand(B, -1), output.expand(B, -1, -1)
        return ids, output

    def _check_rows(self, rule: Rule, x: Tensor) -> None:
        B, T = self.loss.samples, self.loss.tokens
        if x.shape[0] not in (B, B * T):
            raise HftcoreError(
                f"module {rule.name!r} saw an input of shape {tuple(x.shape)}, which has neither B = {B} nor B T = {B * T} rows, "
                "so rows cannot be told apart by sample; freeze its parameters"
            )

    def _touch(self, name: str, grad: Tensor | None) -> None:
        if grad is None:
            return
        self.touched.add(name)
        ids = self.ledger.looked_up(name) if name in self._tied and not is_sharded(grad) else None
        # a head leaves something in every row, a fused loss that took its weight and did not call it too
        if ids is not None and bool(torch.linalg.vector_norm(grad, torch.inf, dim=1).index_fill_(0, ids, 0).any()):
            raise HftcoreError(
                f"parameter {name!r} is an embedding and a head, and got a gradient in rows that were not looked up though the head was "
                "not called: a loss used its weight, which its norm would miss; call the head, or freeze it"
            )

    def take(self, call: Call, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        """Tell the ledger; returns the gradients of the rule's parameters, None where autograd forms them, or nobody."""
        B, rule = self.loss.samples, call.rule
        if call.tokens is not None:
            x, g = by_sample(x, g, call.tokens, B, self.loss.tokens)
        x = x.reshape(B, -1) if isinstance(rule, EmbeddingRule) else x.reshape(B, -1, x.shape[-1])
        found = self.ledger.record(rule, x, g.reshape(B, -1, g.shape[-1]))
        if call.pool is not None and isinstance(rule, ExpertsRule):
            found = call.pool.put(rule, found)
        return tuple(found.get(own) for own in rule.parameters)


class _LinearMode(TorchFunctionMode):
    """Shows the linear maps by one weight to `tap`, which may put another result in the place of theirs."""

    def __init__(self, weight: Tensor, tap: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weight, self.tap, self.seen = weight, tap, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear or len(args) < 2 or args[1] is not self.weight:
            return output
        self.seen += 1
        return self.tap(args[0], output)


class _Tap(torch.autograd.Function):
    """The identity on a module's output; its backward pass hands the module's input and output gradient over.

    As autograd pairs them itself, they fit whatever gradient checkpointing runs again, and however often a module is called.
    """

    @staticmethod
    def forward(ctx: Any, watch: Any, call: Call, x: Tensor, factor: float | Tensor, output: Tensor, *_: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.watch, ctx.call, ctx.factor = watch, call, factor
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        watch = ctx.watch()
        if watch is None or not watch.is_open:
            raise HftcoreError("the backward pass must run inside the capture_grad_norms block of its forward pass")
        if torch.is_grad_enabled():
            raise HftcoreError(
                "gradients in a capture_grad_norms block have no second derivatives; leave create_graph out"
            )
        (x,) = ctx.saved_tensors
        with _without_autocast(g.device.type), torch.no_grad():
            own = watch.take(ctx.call, x.detach(), g if isinstance(ctx.factor, float) else g * ctx.factor)
        return None, None, None, None, g, *own


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # entering the block costs as much as a small kernel
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
