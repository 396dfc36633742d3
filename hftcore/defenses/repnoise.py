"""RepNoise: make the hidden states of harmful answers look like noise, in every layer.

Rosati et al., "Representation Noising: A Defence Mechanism Against Harmful Finetuning", arXiv:2405.14577.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hftcore.defenses.pairs import IGNORED, RULES
from hftcore.defenses.settings import check_choice, check_number
from hftcore.kernels.products import widened
from hftcore.ops import sequence_logprobs

KERNELS = 5


@dataclass
class RepNoiseSettings:
    """Settings of RepNoise, with the authors' defaults. It is very sensitive to the learning rate and the seed.

    Attributes:
        alpha: α >= 0, weight of the ascent on the harmful loss.
        beta: β >= 0, weight of the noise loss. With both 0 it is plain fine-tuning on the tokens that differ.
        lens: count the losses read off every layer by the output head too; the ports in other papers' code leave that out.
        mask_rule: "shifted" or the published "code", see `hftcore.defenses.immunization.ImmunizationSettings`.
    """

    alpha: float = 1.0
    beta: float = 0.001
    lens: bool = True
    mask_rule: str = "shifted"

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("alpha", self.alpha, 0)
        check_number("beta", self.beta, 0)
        check_choice("mask_rule", self.mask_rule, RULES)


def noise_discrepancy(features: Tensor, noise: Tensor) -> Tensor:
    """MMD² of two sets of vectors under five Gaussian kernels, 0-d; the bandwidths carry no gradient.

    Their squares are the mean squared distance of two vectors of the union, divided by 4 and times 1, 2, 4, 8 and 16.

    Args:
        features: [B, D], a sample's masked hidden states as one vector.
        noise: [B, D].

    >>> float(noise_discrepancy(torch.ones(2, 3), torch.ones(2, 3)))
    0.0
    """
    union = widened(torch.cat([features, noise]))
    # by differences: distances from inner products cancel where the vectors are near; made anew in the backward pass, which for every
    # layer would otherwise hold 2 B times the features
    distances = torch.stack([checkpoint(_distances, union, one, use_reentrant=False) for one in union])
    count = len(union)
    bandwidth = distances.detach().sum() / (count * (count - 1)) / 4
    if float(bandwidth) == 0:
        return distances.sum() * 0
    kernel = torch.stack([torch.exp(-distances / (bandwidth * 2**power)) for power in range(KERNELS)]).sum(dim=0)
    half = len(features)
    return (kernel[:half, :half] + kernel[half:, half:] - kernel[:half, half:] - kernel[half:, :half]).mean()


def _distances(union: Tensor, one: Tensor) -> Tensor:
    return (union - one).square().sum(dim=1)


def layer_losses(
    states: Sequence[Tensor],
    norm: Callable[[Tensor], Tensor],
    head: nn.Linear,
    labels: Tensor,
    uniform: Tensor,
    soft_cap: float | None = None,
) -> list[Tensor]:
    """The mean loss over labelled tokens as the output head reads it off each hidden state, without forming all logits.

    Args:
        states: [B, T, D] each; the last has been through the final norm, as transformers returns it, and is not normed again.
        norm: the final norm.
        head: the output head.
        labels: [B, T], position t predicts labels[:, t + 1].
        uniform: [B, T] bool, labels that are scored by a uniform distribution instead.
        soft_cap: of the model's logits, or None.
    """
    count = (labels[:, 1:] != IGNORED).sum()
    blind = (uniform & (labels != IGNORED))[:, 1:].sum()
    visible = labels.masked_fill(uniform, IGNORED)
    losses = []
    for index, state in enumerate(states):
        read = state if index == len(states) - 1 else norm(state)
        sums, _ = sequence_logprobs(read.to(head.weight.dtype), head.weight, visible, head.bias, soft_cap)
        losses.append((blind.to(sums.dtype) * math.log(len(head.weight)) - sums.sum()) / count)
    return losses


def repnoise_penalty(
    features: Mapping[int, Tensor],
    differs: Tensor,
    final: Tensor,
    others: Sequence[Tensor],
    settings: RepNoiseSettings,
    generator: torch.Generator | None = None,
) -> Tensor:
    """β/L Σ_l MMD²(features_l ⊙ m, N(0, I) ⊙ m) − α log(1 + H), 0-d, with gradient; see `docs/baselines.md` for H.

    Args:
        features: layer -> MLP output [B, T, D] on the harmful answers.
        differs: [B, T] bool, m.
        final: the harmful loss of the model's own logits.
        others: those read off the hidden states, embeddings first; empty without `lens`.
        settings: see `RepNoiseSettings`.
        generator: of the noise; None: PyTorch's own.
    """
    penalty = torch.zeros((), device=final.device)
    if settings.beta > 0:
        for state in features.values():
            noise = torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
            shown = differs[:, :, None]
            found = noise_discrepancy((state * shown).flatten(1), (noise * shown).flatten(1))
            penalty = penalty + settings.beta / len(features) * found.to(final.device)
    if settings.alpha > 0:
        read = torch.stack([final, *others]).sum() / max(1, len(others))
        penalty = penalty - settings.alpha * torch.log(1 + read)
    return penalty
