"""Gradients of linear layers' inputs by the native library, where that takes less time than autograd's product."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from hftcore.ops.gradients import host_kernels


@contextmanager
def faster_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, plain linear layers among the modules hand on gradients that the library forms, equal up to rounding.

    Only of their inputs: a layer whose parameters require a gradient while it runs is autograd's. To be entered after all others have
    registered their hooks, for it takes the place of all that autograd knows of a layer's result.
    """
    with ExitStack() as stack:
        for module in modules:
            if type(module).forward is nn.Linear.forward:
                stack.callback(module.register_forward_hook(_take_over, prepend=True).remove)
        yield


def _take_over(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    if len(args) != 1 or not torch.is_grad_enabled() or not args[0].requires_grad or not _is_bare(module):
        return None
    (x,), weight = args, module._parameters["weight"]
    # under autocast they differ
    if weight is None or not x.dtype == output.dtype == weight.dtype:
        return None
    if not host_kernels(output, weight).is_input_gradient(output, weight):
        return None
    found: Tensor = _Multiplied.apply(x, weight, output.detach())
    return found


def _is_bare(module: nn.Module) -> bool:
    """Whether the result is what `nn.Linear` makes of parameters that are constants now, and nobody has touched it since."""
    parameters = module._parameters
    return (
        {"weight", "bias"} <= parameters.keys()
        and not any(parameter.requires_grad for parameter in parameters.values() if parameter is not None)
        and "forward" not in module.__dict__
        and not _global_forward_hooks
        and next(iter(module._forward_hooks.values())) is _take_over
    )


class _Multiplied(torch.autograd.Function):
    """`output`, which is x W^T and perhaps more that does not depend on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return host_kernels(g, weight).input_gradient(g, weight), None, None
