"""SafeMoE: keep the router of a mixture of experts choosing as the aligned model's did on harmful prompts.

"SafeMoE: Safe Fine-Tuning for MoE LLMs by Aligning Harmful Input Routing", arXiv:2509.22745.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hftcore.defenses.settings import check_choice, check_number
from hftcore.errors import HftcoreError

AVERAGES = ("sum", "mean")


@dataclass
class SafeMoESettings:
    """Settings of SafeMoE, with those of the published runs as defaults.

    Attributes:
        tau: τ > 0, temperature of the routing distributions.
        every: optimizer steps between two passes over the safety set; 0: at the end of every epoch.
        layers: "sum" over the layers, the published code, or their "mean", the paper's formula.
    """

    tau: float = 0.1
    every: int = 0
    layers: str = "sum"

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("tau", self.tau, 0, is_open=True)
        check_number("every", self.every, 0)
        if self.every != int(self.every):
            raise HftcoreError(f"every must be a whole number, got {self.every}")
        check_choice("layers", self.layers, AVERAGES)


def last_tokens(logits: Sequence[Tensor], attention_mask: Tensor) -> list[Tensor]:
    """Each layer's router logits at the last token of every sample: [B, E] of [B·T, E] or [B, T, E].

    >>> last_tokens([torch.tensor([[1.0], [2.0], [3.0], [4.0]])], torch.tensor([[1, 0], [1, 1]]))[0]
    tensor([[1.],
            [4.]])
    """
    B, T = attention_mask.shape
    place = torch.arange(T, device=attention_mask.device)
    last = (attention_mask * (place + 1)).argmax(dim=1)
    return [layer.reshape(B, T, -1)[torch.arange(B, device=layer.device), last.to(layer.device)] for layer in logits]


def routing_divergence(
    now: Sequence[Tensor], aligned: Sequence[Tensor], tau: float = 0.1, layers: str = "sum"
) -> Tensor:
    """Σ_l, or mean over l, of the mean over samples of KL(softmax(aligned_l / τ) ‖ softmax(now_l / τ)), 0-d.

    Args:
        now, aligned: [B, E] router logits of each layer; the gradient goes to `now`.

    Raises:
        HftcoreError: there is no layer.

    Source: section 3.2; the published code sums over layers. Softmaxes are float32 at least.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[100.0, 0.0]])
    >>> routing_divergence([even], [sure], tau=1.0)                       # log 2
    tensor(0.6931)
    """
    if not now:
        raise HftcoreError("the model gave no router logits; this defence is for mixtures of experts")
    terms = []
    for mine, theirs in zip(now, aligned, strict=True):
        dtype = torch.promote_types(mine.dtype, torch.float32)
        log_q = torch.log_softmax(mine.to(dtype) / tau, dim=-1)
        log_p = torch.log_softmax(theirs.to(log_q) / tau, dim=-1)
        terms.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().to(now[0].device))
    total = torch.stack(terms).sum()
    return total if layers == "sum" else total / len(terms)
