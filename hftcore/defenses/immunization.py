"""The adversarial loss: learn harmless answers, unlearn the harmful ones to the same prompts.

Rosati et al., "Immunization against harmful fine-tuning attacks", arXiv:2402.16382: the defence of its demonstration.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hftcore.defenses.pairs import RULES
from hftcore.defenses.perturbation import Gradients, Parameters, Pass, finite_norm
from hftcore.defenses.settings import check_choice, check_number


@dataclass
class ImmunizationSettings:
    """Settings of `immunization_step`, with the published defaults.

    Attributes:
        alpha: α >= 0, weight of the harmful loss; 0 is plain fine-tuning on the tokens that differ.
        mask_rule: "shifted": a token that differs is scored by the position before it; or "code", the published code's mask, which also
            zeroes that position's logits where the position itself does not differ.
    """

    alpha: float = 0.1
    mask_rule: str = "shifted"

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("alpha", self.alpha, 0)
        check_choice("mask_rule", self.mask_rule, RULES)


class ImmunizationStep(NamedTuple):
    """What a step saw; the harmful loss is None where α is 0."""

    loss: Tensor
    harmful_loss: Tensor | None = None


def immunization_step(parameters: Parameters, harmless: Pass, harmful: Pass, alpha: float) -> ImmunizationStep:
    """Leave ∇CE(harmless) − α∇CE(harmful) in `param.grad`. Two passes, one where α is 0; one copy of the trained parameters.

    Args:
        parameters: what is trained, `param.grad` empty.
        harmless, harmful: passes over the tokens in which the answers of each pair differ, see `hftcore.defenses.pairs.differing`.
        alpha: α >= 0. The harmful loss has no upper bound, so a large one drives the model away from language.

    Raises:
        NonFiniteError: a harmful gradient is NaN or infinite.
    """
    if alpha == 0:
        return ImmunizationStep(harmless())
    harmful_loss = harmful()
    against = Gradients.take(parameters)
    finite_norm(against, "the harmful gradient")
    loss = harmless()
    against.add_to_grad(parameters, -alpha)
    return ImmunizationStep(loss, harmful_loss)
