"""Cases of the per-sample ops: gradient norms of one matrix, and log-likelihoods under an output head.

Each stands beside the ways other code gets the same numbers, written for this suite in plain PyTorch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bench.ceiling import multiplying, reading
from hftcore.bench.job import Job, Work, shape_of

LIMIT = 4 << 30  # bytes a peer may take: beyond, it sits out and says so
# of the float32 sums; a bfloat16 peer rounds its intermediates to 8 bits
NEAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def norms_work(size: tuple[int, ...], itemsize: int) -> Work:
    """Of the form that takes fewer operations: x and g read once, the products in float32 or on tensor cores."""
    B, T, N, M = size
    return Work(B * T * (N + M) * itemsize + 4 * B, products=B * min(T * T * (M + N), 2 * T * M * N))


def per_sample_gradients(x: Tensor, g: Tensor) -> Tensor:
    """The way of Opacus' hooks: every sample's gradient, then its norm."""
    return torch.einsum("btm,btn->bmn", g, x).float().square().sum(dim=(1, 2))


def full_grams(x: Tensor, g: Tensor) -> Tensor:
    """The way of ghost clipping: both T x T matrices of every sample, whole, in the dtype of the inputs."""
    return ((x @ x.mT) * (g @ g.mT)).sum(dim=(1, 2), dtype=torch.float32)


def one_at_a_time(x: Tensor, g: Tensor) -> Tensor:
    """A loop over the samples, one weight gradient each."""
    return torch.stack([(one.mT @ inputs).float().square().sum() for one, inputs in zip(g, x, strict=True)])


def norms_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares `grad_norms_sq` of a linear layer's inputs and output gradients."""
    draw = torch.Generator(device).manual_seed(0)
    B, T, N, M = shape_of(shape, dtype)
    x = torch.randn(B, T, N, generator=draw, device=device, dtype=dtype)
    g = torch.randn(B, T, M, generator=draw, device=device, dtype=dtype) / T
    ways = {
        "per-sample gradients (Opacus' hooks)": (per_sample_gradients, B * M * N * dtype.itemsize * 2),
        "whole Gram matrices (ghost clipping)": (full_grams, 3 * B * T * T * dtype.itemsize),
        "loop over samples": (one_at_a_time, M * N * 8),
    }
    return Job(
        ours=lambda: ops.grad_norms_sq(x, g),
        peers={name: partial(way, x, g) for name, (way, taken) in ways.items() if taken <= LIMIT},
        missing={name: _too_large(taken) for name, (_, taken) in ways.items() if taken > LIMIT},
        restore=lambda: None,
        agrees=lambda ours, theirs: torch.allclose(ours, theirs, rtol=NEAR[dtype]),
        ceilings=multiplying(dtype, device) | reading(x),
    )


def logprobs_work(size: tuple[int, ...], itemsize: int) -> Work:
    B, T, D, V = size
    return Work((B * T * D + V * D) * itemsize, products=2 * B * (T - 1) * D * V)


def all_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Every logit of every token, log_softmax, gather."""
    every = (hidden @ head.T).float().log_softmax(dim=-1)
    return every[:, :-1].gather(2, labels[:, 1:, None])[..., 0].sum(dim=1)


def one_sample_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The same, one sample at a time."""
    parts = zip(hidden.split(1), labels.split(1), strict=True)
    return torch.cat([all_logits(one, head, label) for one, label in parts])


def logprobs_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares `sequence_logprobs` without gradients; every token has a label."""
    draw = torch.Generator(device).manual_seed(0)
    B, T, D, V = shape_of(shape, dtype)
    hidden = torch.randn(B, T, D, generator=draw, device=device, dtype=dtype)
    head = (torch.randn(V, D, generator=draw, device=device) / D**0.5).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=draw, device=device)

    @torch.no_grad()
    def call(way: Callable[..., Tensor]) -> Tensor:
        return way(hidden, head, labels)

    ways = {
        "logits + log_softmax": (all_logits, 2 * B * T * V * 4),
        "logits + log_softmax, a sample at a time": (one_sample_logits, 2 * T * V * 4),
    }
    return Job(
        ours=lambda: call(lambda *inputs: ops.sequence_logprobs(*inputs)[0]),
        peers={name: partial(call, way) for name, (way, taken) in ways.items() if taken <= LIMIT},
        missing={name: _too_large(taken) for name, (_, taken) in ways.items() if taken > LIMIT},
        restore=lambda: None,
        agrees=lambda ours, theirs: torch.allclose(ours, theirs, rtol=NEAR[dtype]),
        ceilings=multiplying(dtype, device) | reading(head),
    )


def cross_entropy_work(size: tuple[int, ...], itemsize: int) -> Work:
    """The logits, and the products of their gradient with the head and with the hidden states; head and gradients once each."""
    B, T, D, V = size
    return Work((2 * B * T * D + 2 * V * D) * itemsize, products=6 * B * (T - 1) * D * V)


def cross_entropy_of_logits(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What a Trainer with per-sample weights writes: every logit, cross_entropy without reduction."""
    logits = (hidden[:, :-1] @ head.T).float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return (weights * each.sum(dim=1)).sum() / (weights.sum() * each.shape[1])


def cross_entropy_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares `weighted_cross_entropy` and its gradients to hidden states and head; every token has a label."""
    draw = torch.Generator(device).manual_seed(0)
    B, T, D, V = shape_of(shape, dtype)
    hidden = torch.randn(B, T, D, generator=draw, device=device, dtype=dtype, requires_grad=True)
    head = (torch.randn(V, D, generator=draw, device=device) / D**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=draw, device=device)
    weights = torch.linspace(0.1, 1, B, device=device)
    taken = 4 * B * T * V * 4

    def gradients(loss: Callable[..., Tensor]) -> Tensor:
        # those of one sample and of some tokens: all of them would be copied in every round
        of_hidden, of_head = torch.autograd.grad(loss(hidden, head, labels, weights), (hidden, head))
        return torch.cat((of_hidden[0].flatten(), of_head[:64].flatten())).float()

    ways: dict[str, Callable[[], Tensor]] = {"logits + cross_entropy": partial(gradients, cross_entropy_of_logits)}
    return Job(
        ours=lambda: gradients(ops.weighted_cross_entropy),
        peers=ways if taken <= LIMIT else {},
        missing={} if taken <= LIMIT else dict.fromkeys(ways, _too_large(taken)),
        restore=lambda: None,
        agrees=lambda ours, theirs: float((ours - theirs).abs().max()) <= NEAR[dtype] * float(theirs.abs().max()),
        ceilings=multiplying(dtype, device) | reading(head.detach()),
    )


def _too_large(taken: int) -> str:
    return f"it would take {taken / 1e9:.0f} GB, more than the {LIMIT / 1e9:.0f} GB a peer may"
