"""Per-sample gradient norms from one ordinary backward pass, without per-sample gradients."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hftcore import checks
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.grad_ledger import Ledger
from hftcore.grad_loss import SampleLoss
from hftcore.grad_watch import Watch
from hftcore.kernels.products import accumulator
from hftcore.layers import blocks


@contextmanager
def capture_grad_norms(
    model: nn.Module, loss: str = "mean", norms_only: bool = False, keep: bool = False, loss_scale: float = 1.0
) -> Iterator["GradNorms"]:
    """Yield a `GradNorms` that holds, after one forward and one backward pass of `model` inside the block, each sample's norms.

    The gradient is that over all parameters that require one, of the sample's own loss. The batch's loss is taken to be the one
    transformers' causal language models give: the sum over supervised tokens divided by their number in the batch (or by
    `num_items_in_batch`, if the model was given it). `param.grad` is filled as ever, equal to the plain one up to rounding. Samples must
    not influence each other (no batch statistics, no sequences packed across rows). Gradient checkpointing of both kinds, modules
    called more than once, tied embeddings and LoRA factors are right; the frozen weights under LoRA do not count. What torch.compile
    made runs uncompiled inside the block. Every hook is gone at the end, also after an exception.

    Under DistributedDataParallel and FSDP2 (`fully_shard`) each process gets the norms of its own samples, whole ones, for FSDP2 gathers
    the weights a module needs. `param.grad` is the mean over processes, as ever.

    Args:
        loss: of which loss of a sample the gradient is: "mean" over its own supervised tokens; their "sum"; or its "share" of the
            batch's loss, whatever that loss is. "mean" and "sum" need the model to be called with `labels` (or `shift_labels`).
        norms_only: `param.grad` stays as it is, and no gradient of a matrix is computed. DistributedDataParallel would wait for
            gradients: give and call the module that it wraps.
        keep: keep inputs and output gradients until the `GradNorms` is dropped, which `norms.backward(weights)` needs.
        loss_scale: what the loss was multiplied by before its backward pass (a GradScaler's scale, or 1 / accumulation steps).

    Raises:
        HftcoreError: a trained parameter of a kind whose per-sample gradients are not known (by name); a second forward pass in the
            block; no backward pass in it, or one with `create_graph=True`; labels missing; a module that does not see one row for each
            sample; weights that are DTensors while their module runs (tensor parallelism).
        NonFiniteError: a norm is NaN or infinite (parameter and sample by name).

    Source: Goodfellow 2015 (arXiv:1510.01799); Li et al. 2022 (arXiv:2110.05679); Bu et al. 2023 (arXiv:2210.00038) for sums weighted
    from what the one backward pass saw.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with capture_grad_norms(layer, loss="share") as norms:
    ...     layer(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
    >>> norms.per_sample
    tensor([5., 1.])
    """
    checks.model(model)
    if norms_only and isinstance(model, nn.parallel.DistributedDataParallel):
        raise HftcoreError(
            "norms_only leaves no gradients for DistributedDataParallel to exchange; give capture_grad_norms the module that it wraps, "
            "model.module, and call that"
        )
    watch = Watch(model, SampleLoss(loss, loss_scale), Ledger(norms_only, keep))
    norms = GradNorms(_parts(model, watch), watch.loss, watch.ledger)
    with watch.hooked(), _uncompiled():
        yield norms
    watch.ledger.close()
    norms._check(watch.touched)


class GradNorms:
    """The norms of each sample's gradient; see `capture_grad_norms`."""

    def __init__(self, parts: dict[str, str], loss: SampleLoss, ledger: Ledger):
        self._names, self._parts = list(parts), list(parts.values())
        self._loss = loss
        self._ledger = ledger

    @property
    def per_sample(self) -> Tensor:
        """[B] float32: the norm of each sample's gradient over all trained parameters."""
        return self._scaled_squares().sum(dim=0).sqrt()

    @property
    def per_parameter(self) -> dict[str, Tensor]:
        """Parameter name -> [B] float32; the squares add up to that of `per_sample`. Tied weights are one parameter."""
        return dict(zip(self._names, self._scaled_squares().sqrt(), strict=True))

    @property
    def per_layer(self) -> dict[str, Tensor]:
        """Part of the model -> [B] float32; the squares add up to that of `per_sample`.

        Parts are the decoder blocks ("model.layers.0", ...) and, for the parameters outside them, their own modules
        ("model.embed_tokens", "model.norm", "lm_head"), in the order of the model. A tied weight counts with the first of its modules.
        """
        parts: dict[str, list[Tensor]] = {}
        for part, square in zip(self._parts, self._scaled_squares(), strict=True):
            parts.setdefault(part, []).append(square)
        return {part: torch.stack(squares).sum(dim=0).sqrt() for part, squares in parts.items()}

    def backward(self, weights: Tensor) -> None:
        """Add the weighted sum of the samples' gradients, Σ_b weights[b] g_b, to `param.grad`, without another backward pass.

        g_b is the gradient whose norm is `per_sample[b]`. Use with `norms_only=True`, or zero the gradients first: what the ordinary
        backward pass left in `param.grad` stays there. Nothing is exchanged between processes, but for FSDP2's sharded parameters: they
        get the mean over processes of these sums, each the part that it holds, so every process must make the call.

        Args:
            weights: [B], any real dtype, finite.

        Raises:
            HftcoreError: `keep=True` was not asked for, or weights of another shape; no gradient has been changed then.
        """
        if not self._ledger.keep:
            raise HftcoreError("norms.backward needs capture_grad_norms(model, keep=True): inputs were not kept")
        self._scaled_squares()
        shape = (self._loss.samples,)
        if not isinstance(weights, Tensor) or weights.shape != shape or not bool(weights.isfinite().all()):
            raise HftcoreError(f"weights must be a finite tensor of shape {shape}, one value a sample, got {weights}")
        for rule, x, g in self._ledger.kept:
            factor = (weights.to(g.device).double() * self._loss.scale(g.device)).to(accumulator(g.dtype))
            weighted = g.to(factor.dtype) * factor[:, None, None]
            found = {own: vector.sum(dim=0) for own, vector in rule.vectors(x, weighted).items()}
            if rule.matrix in rule.parameters:
                found[rule.matrix] = rule.gradient(x, weighted)
            for own, value in found.items():
                rule.add_gradient(own, value)

    def _check(self, touched: set[str]) -> None:
        seen = self._ledger.squares()
        outside = sorted(touched if self._ledger.norms_only else touched - seen.keys())
        if outside:
            raise HftcoreError(
                f"parameter {outside[0]!r} got a gradient from outside the forward pass of its module, "
                "which its norm would miss; freeze it"
            )
        bad = (~self._scaled_squares().isfinite()).nonzero()
        if len(bad):
            row, sample = bad[0].tolist()
            raise NonFiniteError(
                f"the gradient of parameter {self._names[row]!r} is NaN or infinite for sample {sample}; look at the loss and the data"
            )
        if self._loss.unsupervised:
            warnings.warn(
                f"samples {self._loss.unsupervised} have no supervised token (all labels -100): their norm is 0",
                stacklevel=4,
            )

    def _scaled_squares(self) -> Tensor:
        """[trained parameters, B] float32"""
        squares = self._ledger.squares()
        if not squares:
            raise HftcoreError("no backward pass ran in the capture_grad_norms block; call loss.backward() inside it")
        device = next(iter(squares.values())).device
        scale = self._loss.scale(device).square()
        none = torch.zeros(self._loss.samples, dtype=torch.float32, device=device)
        every = torch.stack([squares.get(name, none).to(device) for name in self._names])
        return (every.double() * scale).float()


def _uncompiled() -> AbstractContextManager[None]:
    """A compiler that traced the hooks would stop at them."""
    # importing it takes seconds, and without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _parts(model: nn.Module, watch: Watch) -> dict[str, str]:
    """Name of each trained parameter -> the part of the model that it counts with."""
    names = {module: name for name, module in watch.modules.items()}
    has_blocks = any(isinstance(module, nn.ModuleList) and len(module) for module in names)
    found = tuple(f"{names[block]}." for block in (blocks(model) if has_blocks else ()))
    parts = {}
    for name in watch.trained:
        inside = next((block for block in found if name.startswith(block)), "")
        parts[name] = (inside or name[: name.rfind(".") + 1]).removesuffix(".")
    return parts
