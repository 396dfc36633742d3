"""Per-sample log-likelihoods of responses, and the weighted loss made of them, without the logits of all tokens."""

import importlib
import math
from typing import Any, Literal

import torch
from torch import Tensor

from hftcore.backend import backend_for, device_of
from hftcore.checks import dense
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels import likelihood as eager
from hftcore.kernels.products import accumulator

IGNORED = -100
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sequence_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    shift: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum of the log-likelihoods of each sample's labelled tokens, and their number.

    Only positions with a label are computed, and never more than a tile of their logits exists at a time. The sum is differentiable
    in `hidden`, `head_weight` and `bias`, once; its backward computes the tiles again. Under `torch.no_grad()` nothing is kept.

    Args:
        hidden: [B, T, D] float32, bfloat16, float16 or float64: what the output head gets, after the final norm.
        head_weight: [V, D] of the dtype of `hidden`, any strides.
        labels: [B, T] integers in 0..V-1, or -100 where nothing is to be predicted.
        bias: [V] float, or None.
        soft_cap: positive; logits become soft_cap * tanh(logits / soft_cap), as Gemma 2 does. None: none.
        shift: True for causal language models: position t predicts labels[:, t + 1], and labels[:, 0] is predicted by nothing. False:
            position t predicts labels[:, t].

    Returns:
        [B] sums in nats, float32 (float64 for float64 inputs), and [B] int64 counts. A sample without a label has sum 0 and count 0.

    Raises:
        HftcoreError: shapes, dtypes or devices that do not fit, or a label outside the vocabulary; in the backward, `create_graph=True`.
        NonFiniteError: the likelihood of a label is NaN or infinite. Hidden states without a label are not looked at.

    Source: the likelihoods of Antibody's weights (arXiv:2603.00498, eq. 7). The paper sums over tokens; its published code takes the
    mean, which is sum / count. Logits are float32 even for bfloat16 inputs, unlike those of a bfloat16 head.

    >>> hidden = torch.zeros(1, 3, 4)                    # every token of a vocabulary of 8 is equally likely
    >>> sums, counts = sequence_logprobs(hidden, torch.ones(8, 4), torch.tensor([[-100, 5, 2]]))
    >>> sums / counts, -torch.tensor(8.0).log()
    (tensor([-2.0794]), tensor(-2.0794))
    """
    _check(hidden, head_weight, labels, bias, soft_cap)
    return _sums(hidden, head_weight, labels, bias, soft_cap, shift)


def weighted_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    shift: bool = True,
    normalize: Literal["weighted-tokens", "sum"] | float | Tensor = "weighted-tokens",
) -> Tensor:
    """Cross entropy in which each sample has a weight: Σ_i w_i Σ_t CE_it / denominator.

    Gradients flow to `hidden`, `head_weight` and `bias`, each only if it asks for one; the weights are constants. The [B, T, V] logits
    exist neither in the forward nor in the backward.

    Args:
        hidden, head_weight, labels, bias, soft_cap, shift: as for `sequence_logprobs`.
        weights: [B] finite float.
        normalize: the denominator. "weighted-tokens": max(Σ_i w_i N_i, 1) with N_i the labelled tokens of sample i; with weights all 1
            this is the mean over tokens that transformers uses. "sum": 1. A positive number or 0-d tensor: itself, for instance the token
            count of all batches that are accumulated.

    Returns:
        0-d loss, float32 (float64 for float64 inputs); 0 if no token has a label.

    Raises:
        HftcoreError, NonFiniteError: as for `sequence_logprobs`; weights or a denominator that do not fit.

    Source: Antibody's fine-tuning loss (arXiv:2603.00498). "sum" is eq. 12 with its softmax weights, "weighted-tokens" the published code.

    >>> hidden, head, labels = torch.zeros(2, 3, 4), torch.ones(8, 4), torch.tensor([[-100, 5, 2], [-100, -100, 1]])
    >>> weighted_cross_entropy(hidden, head, labels, torch.tensor([1.0, 0.0]), normalize="sum")
    tensor(4.1589)
    """
    _check(hidden, head_weight, labels, bias, soft_cap)
    weights = _weights(weights, hidden)
    denominator = _denominator(normalize)
    sums, counts = _sums(hidden, head_weight, labels, bias, soft_cap, shift)
    weights = weights.to(sums.dtype)
    if denominator is None:
        denominator = (weights * counts).sum().clamp(min=1)
    return -(weights * sums).sum() / denominator


def _sums(
    hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, soft_cap: float | None, shift: bool
) -> tuple[Tensor, Tensor]:
    predictions = labels[:, 1:] if shift else labels
    labelled = predictions != IGNORED
    return _SequenceLogprobs.apply(hidden, head, bias, predictions, labelled, soft_cap), labelled.sum(dim=1)


class _SequenceLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        predictions: Tensor,
        labelled: Tensor,
        soft_cap: float | None,
    ) -> Tensor:
        samples, positions = labelled.nonzero(as_tuple=True)
        target = predictions[samples, positions].long()
        rows = hidden[samples, positions]
        with torch.autocast(hidden.device.type, enabled=False), device_of(hidden):
            logprobs, lse = _kernels(rows, head, soft_cap).token_logprobs(rows, head, target, bias, soft_cap)
        if not bool(logprobs.isfinite().all()):
            raise NonFiniteError(_culprit(rows, head, bias, logprobs, samples, positions))
        ctx.save_for_backward(hidden, head, bias, samples, positions, target, lse)
        ctx.soft_cap = soft_cap
        # summed as rows of a matrix: in one order, which index_add does not promise on a GPU
        every = torch.zeros(labelled.shape, dtype=torch.float64, device=hidden.device)
        every[samples, positions] = logprobs
        return every.sum(dim=1).to(accumulator(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # autograd would take the gradients for constants
            raise HftcoreError(
                "likelihoods have no second derivatives; leave create_graph out, or make the logits and use cross_entropy"
            )
        hidden, head, bias, samples, positions, target, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False), device_of(hidden):
            rows, coefficient = hidden[samples, positions], d_sums[samples]
            d_rows, d_head, d_bias = _kernels(rows, head, ctx.soft_cap).token_gradients(
                rows, head, target, bias, ctx.soft_cap, lse, coefficient, wanted
            )
        d_hidden = None
        if d_rows is not None:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[samples, positions] = d_rows
        return d_hidden, d_head, d_bias, None, None, None


def _kernels(rows: Tensor, head: Tensor, soft_cap: float | None) -> Any:
    """The module that serves these."""
    backend = backend_for(rows.device.type)
    # the fused kernels have no float64
    if backend == "triton" and rows.dtype != torch.float64:
        return importlib.import_module("hftcore.kernels.triton_likelihood")
    if backend == "native":
        native = importlib.import_module("hftcore.kernels.native_likelihood")
        if native.serves(rows, head, soft_cap):
            return native
    return eager


def _culprit(
    rows: Tensor, head: Tensor, bias: Tensor | None, logprobs: Tensor, samples: Tensor, positions: Tensor
) -> str:
    first = int((~logprobs.isfinite()).nonzero()[0])
    where = f"hidden[{int(samples[first])}, {int(positions[first])}]"
    if not bool(rows[first].isfinite().all()):
        return (
            f"{where} holds NaN or infinity; look for an overflow in the model's forward (float16, a bad learning rate)"
        )
    for name, value in (("head_weight", head), ("bias", bias)):
        if value is not None and not bool(value.isfinite().all()):
            return f"{name} holds NaN or infinity; repair it before measuring likelihoods"
    return f"the logits of {where} overflow float32; the model's hidden states or head are too large"


def _denominator(normalize: str | float | Tensor) -> float | Tensor | None:
    """A number, or None for the weighted count of tokens."""
    if isinstance(normalize, str) and normalize in ("weighted-tokens", "sum"):
        return None if normalize == "weighted-tokens" else 1.0
    if isinstance(normalize, Tensor) and normalize.dim() == 0:
        normalize = normalize.detach()
    elif not isinstance(normalize, int | float):
        raise HftcoreError(f'normalize must be "weighted-tokens", "sum" or a positive number, got {normalize!r}')
    if not (math.isfinite(normalize) and normalize > 0):
        raise HftcoreError(f"normalize must be a positive number, got {normalize!r}")
    return normalize


def _weights(weights: Tensor, hidden: Tensor) -> Tensor:
    if weights.shape != hidden.shape[:1] or not weights.is_floating_point():
        raise HftcoreError(
            f"weights must be float of shape {tuple(hidden.shape[:1])} (one a sample of hidden), "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    if weights.device != hidden.device:
        raise HftcoreError(f"weights must be on {hidden.device} with hidden, got {weights.device}")
    if not bool(weights.isfinite().all()):
        raise NonFiniteError(f"weights must be finite, got {weights.tolist()}")
    return weights.detach()


def _check(hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, soft_cap: float | None) -> None:
    dense("hidden", hidden)
    dense("head_weight", head)
    dense("labels", labels)
    if hidden.dim() != 3 or hidden.dtype not in FLOATS:
        raise HftcoreError(f"hidden must be [B, T, D] in a float dtype, got {hidden.dtype} {tuple(hidden.shape)}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[2] or head.shape[0] == 0:
        raise HftcoreError(
            f"head_weight must be [V, {hidden.shape[2]}] (V tokens, the last axis of hidden), got {tuple(head.shape)}"
        )
    if head.dtype != hidden.dtype:
        raise HftcoreError(
            f"head_weight must have the dtype of hidden, {hidden.dtype}, got {head.dtype}; cast hidden with hidden.to(head_weight.dtype)"
        )
    if labels.shape != hidden.shape[:2] or labels.dtype not in (torch.int64, torch.int32):
        raise HftcoreError(
            f"labels must be int64 or int32 of shape {tuple(hidden.shape[:2])} (hidden without its last axis), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if bias is not None and (bias.shape != head.shape[:1] or not bias.is_floating_point()):
        raise HftcoreError(
            f"bias must be float of shape ({head.shape[0]},) (one a token), got {bias.dtype} {tuple(bias.shape)}"
        )
    for name, tensor in (("head_weight", head), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise HftcoreError(f"{name} must be on {hidden.device} with hidden, got {tensor.device}")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise HftcoreError(f"soft_cap must be a positive number or None, got {soft_cap}")
    outside = ((labels < 0) & (labels != IGNORED)) | (labels >= head.shape[0])
    if bool(outside.any()):
        sample, position = outside.nonzero()[0].tolist()
        raise HftcoreError(
            f"labels[{sample}, {position}] must be in 0..{head.shape[0] - 1} or -100 (not predicted), got {int(labels[sample, position])}"
        )
