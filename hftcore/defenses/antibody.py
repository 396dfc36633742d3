"""Antibody's fine-tuning stage: samples pull on the weights by how much likelier their answer is than a refusal.

arXiv:2603.00498; where paper and published code differ is tabled in `docs/antibody.md`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hftcore.defenses.settings import check_choice, check_number
from hftcore.errors import HftcoreError, NonFiniteError

SCORES = ("mean", "sum")
SCALES = ("code", "eq12", "eq12-mean")
ATTENUATIONS = ("none", "norm")
SPANS = ("micro-batch", "step")


@dataclass
class WeightSettings:
    """Settings of Antibody's weights, with those of the published runs as defaults.

    Attributes:
        tau: τ > 0 of the softmax; the larger, the more alike the weights.
        score: the likelihoods in r: "mean" over tokens (published code), or their "sum" (eq. 7 as written), which with τ = 1 gives nearly
            all weight to one sample.
        scale: the loss made with the weights w: "code", Σ w_i s_i / Σ w_i N_i, on the scale of plain fine-tuning; "eq12", Σ w_i s_i;
            "eq12-mean", Σ w_i s_i / N_i. s_i is the sample's negative log-likelihood, summed over its N_i supervised tokens.
        weights_over: the samples that share one softmax: a "micro-batch" (published code), or all of a "step", over gradient accumulation
            and processes.
        attenuation: "none", or "norm", an extension that is not Antibody: w_i · min(1, C / ‖∇ℓ_i‖), ℓ_i = s_i / N_i.
        quantile: in (0, 1]; C is this quantile of the norms of the last `window` samples.
        window: >= 1.
    """

    tau: float = 1.0
    score: str = "mean"
    scale: str = "code"
    weights_over: str = "micro-batch"
    attenuation: str = "none"
    quantile: float = 0.5
    window: int = 512

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("tau", self.tau, 0, is_open=True)
        check_number("quantile", self.quantile, 0, 1, is_open=True)
        check_number("window", self.window, 1)
        check_choice("score", self.score, SCORES)
        check_choice("scale", self.scale, SCALES)
        check_choice("weights_over", self.weights_over, SPANS)
        check_choice("attenuation", self.attenuation, ATTENUATIONS)
        if self.attenuation == "norm" and self.weights_over == "step":
            raise HftcoreError('attenuation="norm" needs weights_over="micro-batch", got "step"')


def log_ratios(
    sums: Tensor, counts: Tensor, refusal_sums: Tensor, refusal_counts: Tensor, score: str = "mean"
) -> Tensor:
    """r_i = log π(y_i | x_i) − log π(refusal_i | x_i), [B], without gradient.

    Args:
        sums, counts: [B] log-likelihood in nats and number of tokens of each target, as `sequence_logprobs` gives them.
        refusal_sums, refusal_counts: the same of each refusal.
        score: "sum", or "mean": each likelihood is divided by its number of tokens.

    Source: eq. 7.

    >>> log_ratios(torch.tensor([-6.0]), torch.tensor([3]), torch.tensor([-5.0]), torch.tensor([5]))
    tensor([-1.])
    """
    if score == "sum":
        return (sums - refusal_sums).detach()
    return (sums / counts.clamp(min=1) - refusal_sums / refusal_counts.clamp(min=1)).detach()


def coefficients(weights: Tensor, counts: Tensor, scale: str = "code") -> Tensor:
    """[B] c_i with which the loss is Σ c_i s_i, s_i a sample's summed negative log-likelihood; see `WeightSettings.scale`.

    >>> coefficients(torch.tensor([0.75, 0.25]), torch.tensor([2, 2]))
    tensor([0.3750, 0.1250])
    """
    if scale == "eq12":
        return weights
    if scale == "eq12-mean":
        return weights / counts.clamp(min=1)
    return weights / (weights * counts).sum().clamp(min=1)


class RunningSoftmax:
    """exp(r/τ) over samples that come in groups, relative to the largest seen so far: softmax weights without a first pass.

    What was summed with the numbers of earlier groups must be multiplied by the factor that `add` returns; at the end the weights are
    those numbers over `total`.

    >>> softmax = RunningSoftmax(tau=1.0)
    >>> softmax.add(torch.zeros(1)), softmax.numbers(torch.zeros(1))
    (1.0, tensor([1.]))
    >>> softmax.add(torch.full((1,), 1000.0)), softmax.numbers(torch.full((1,), 1000.0)), softmax.total
    (0.0, tensor([1.]), 1.0)
    """

    def __init__(self, tau: float):
        self.tau = tau
        self.largest = -math.inf
        self.total = 0.0

    def add(self, ratios: Tensor) -> float:
        """Take the r [B] of a group; returns the factor for everything before."""
        largest = max(self.largest, float(ratios.max()))
        factor = 1.0 if self.largest == -math.inf else math.exp((self.largest - largest) / self.tau)
        self.largest = largest
        self.total = self.total * factor + float(self.numbers(ratios).sum())
        return factor

    def numbers(self, ratios: Tensor) -> Tensor:
        """[B] in [0, 1], of samples that were taken."""
        return ((ratios.double() - self.largest) / self.tau).exp().to(ratios.dtype)


def running_bound(norms: Tensor, history: Tensor, settings: WeightSettings) -> tuple[float, Tensor]:
    """C, the `quantile` of the last `window` of `history` and `norms`, and those norms, which are the next history.

    Raises:
        NonFiniteError: a norm is NaN or infinite.

    >>> running_bound(torch.tensor([1.0, 4.0]), torch.tensor([2.0]), WeightSettings())
    (2.0, tensor([2., 1., 4.]))
    """
    if not bool(norms.isfinite().all()):
        raise NonFiniteError(f"gradient norms must be finite, got {norms.tolist()}")
    history = torch.cat([history.to(norms), norms.detach()])[-settings.window :]
    return float(torch.quantile(history, settings.quantile)), history


def attenuation(norms: Tensor, bound: float) -> Tensor:
    """min(1, C / norm) for each sample, [B]; 1 where the norm is 0.

    This project's own extension: it bounds the pull of a sample whose gradient is larger than usual.

    >>> attenuation(torch.tensor([1.0, 4.0, 0.0]), bound=2.0)
    tensor([1.0000, 0.5000, 1.0000])
    """
    return torch.where(norms > bound, bound / norms, torch.ones_like(norms))
