"""Panacea: fine-tune, then move the weights to where the harmful loss is high.

Wang et al., "Panacea: Mitigating Harmful Fine-tuning for Large Language Models via Post-fine-tuning Perturbation", arXiv:2501.18100.
Where paper and published code differ is tabled in `docs/panacea.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hftcore.defenses.merged import Factors, merged_length
from hftcore.defenses.perturbation import Gradients, Parameters, Pass, finite_norm, perturbed
from hftcore.defenses.settings import check_choice, check_number

SPACES = ("trained", "merged")


@dataclass
class PanaceaSettings:
    """Settings of `panacea_step`, with the published defaults.

    Attributes:
        rho: ρ >= 0, the length of the perturbation; 0 is plain fine-tuning.
        lam: λ >= 0; 0 trains plainly and costs one harmful gradient at the very end.
        space: where ρ is measured: of the "trained" parameters, LoRA's factors as published, or of the "merged" weights.
        clamp: a harmful loss above this at the moved weights counts as this; None (the paper), or the published code's 5.
    """

    rho: float = 1.0
    lam: float = 0.001
    space: str = "trained"
    clamp: float | None = None

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("rho", self.rho, 0)
        check_number("lam", self.lam, 0)
        check_choice("space", self.space, SPACES)
        if self.clamp is not None:
            check_number("clamp", self.clamp, 0, is_open=True)


class PanaceaStep(NamedTuple):
    """What a step saw: h(w), h(w + ε), and ε as a direction and its length. None where h was not looked at."""

    loss: Tensor
    harmful_loss: Tensor | None = None
    moved_loss: Tensor | None = None
    direction: Gradients | None = None
    length: float = 0.0


def panacea_step(
    parameters: Parameters, user: Pass, harmful: Pass, settings: PanaceaSettings, factors: Sequence[Factors] = ()
) -> PanaceaStep:
    """Leave ∇g(w) − λ(∇h(w + ε) − ∇h(w)) in `param.grad`, ε = ρ∇h(w)/‖∇h(w)‖; w is as before, bit for bit.

    Three passes, one where λ or ρ is 0. Beside the parameters and their `.grad`, at most two copies of the trained parameters exist;
    one of them, the direction of ε, is returned.

    Args:
        parameters: what is trained, `param.grad` empty.
        user: the pass of g, the user's data.
        harmful: that of h, harmful answers; run twice, on the same data. Where processes share a step, it must return the common loss.
        settings: see `PanaceaSettings`.
        factors: for space "merged", as `lora_factors` gives them.

    Raises:
        HftcoreError: bad settings.
        NonFiniteError: a gradient of h is NaN or infinite; the parameters are as before.

    Source: eqs. 1-3 and algorithm 1. Their code divides by ‖∇h‖ + 1e-7. Where ∇h is zero the step is plain fine-tuning.
    """
    settings.check()
    if settings.lam == 0 or settings.rho == 0:
        return PanaceaStep(user())
    harmful_loss = harmful()
    direction = Gradients.take(parameters)
    length = step_length(parameters, direction, settings.rho, settings.space, factors)
    with perturbed(parameters, direction, length):
        moved_loss = harmful()
        rise = Gradients.take(parameters)
    if settings.clamp is not None and float(moved_loss) > settings.clamp:
        rise = Gradients({})
    rise.add_(direction, -1.0)
    finite_norm(rise, "the gradient at the moved point")
    loss = user()
    rise.add_to_grad(parameters, -settings.lam)
    return PanaceaStep(loss, harmful_loss, moved_loss, direction, length)


def step_length(
    parameters: Parameters, direction: Gradients, rho: float, space: str, factors: Sequence[Factors] = ()
) -> float:
    """How far to go along a direction to have gone `rho` in `space`.

    Raises:
        NonFiniteError: the direction holds NaN or infinity; in the space "trained" it is not looked at.
    """
    return merged_length(parameters, factors, direction, rho) if space == "merged" else rho
