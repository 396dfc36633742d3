"""Booster: align where a step of harmful fine-tuning would gain little.

Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful Perturbation", arXiv:2409.01586.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hftcore.defenses.perturbation import Parameters, Pass, gradient_change
from hftcore.defenses.settings import check_number


@dataclass
class BoosterSettings:
    """Settings of `booster_step`, with the published defaults.

    Attributes:
        lam: λ >= 0, weight of the loss reduction; 0 is plain fine-tuning.
        alpha: α >= 0, length of the harmful step that is simulated; 0 is plain fine-tuning.
    """

    lam: float = 5.0
    alpha: float = 0.1

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("lam", self.lam, 0)
        check_number("alpha", self.alpha, 0)


class BoosterStep(NamedTuple):
    """What a step saw; h(w) − h(w − αĝ) is the loss reduction that is held down."""

    loss: Tensor
    harmful_loss: Tensor | None = None
    reduction: Tensor | None = None


def booster_step(parameters: Parameters, align: Pass, harmful: Pass, settings: BoosterSettings) -> BoosterStep:
    """Leave ∇f(w) + λ(∇h(w) − ∇h(w − α∇h/‖∇h‖)) in `param.grad`; w is as before, bit for bit.

    Three passes, one where λ or α is 0. At most two copies of the trained parameters beside them and their `.grad`.

    Args:
        parameters: what is trained, `param.grad` empty.
        align: the pass of f, alignment data.
        harmful: that of h, harmful answers; run twice, on the same data.
        settings: see `BoosterSettings`.

    Raises:
        HftcoreError: bad settings, or `param.grad` is not empty.
        NonFiniteError: a gradient of h is NaN or infinite; the parameters are as before.

    Source: eq. 1 and algorithm 1. It is Antibody's alignment with a constant λ and no refusal loss. Their code restores w by adding the
    step back, which drifts in bfloat16.
    """
    settings.check()
    if settings.lam == 0 or settings.alpha == 0:
        return BoosterStep(align())
    losses: list[Tensor] = []

    def observed() -> Tensor:
        losses.append(harmful())
        return losses[-1]

    change = gradient_change(parameters, observed, -settings.alpha)
    loss = align()
    change.add_to_grad(parameters, settings.lam)
    return BoosterStep(loss, losses[0], losses[0] - losses[1])
