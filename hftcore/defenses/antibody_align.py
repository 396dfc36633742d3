"""Antibody's alignment stage: refuse, from a place where the harmful loss is flat.

"Antibody: Strengthening Defense Against Harmful Fine-Tuning for Large Language Models via Attenuating Harmful Gradient Influence",
arXiv:2603.00498. Where paper and published code differ is tabled in `docs/antibody.md`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hftcore.defenses.perturbation import Gradients, Parameters, Pass, finite_norm, gradient_change
from hftcore.defenses.settings import check_choice, check_number
from hftcore.errors import HftcoreError

RULES = ("theorem", "code", "constant")
CODE_MOMENTUM = 0.99


@dataclass
class AlignSettings:
    """Settings of `align_step`, with the published defaults.

    Attributes:
        rho: ρ >= 0, how far downhill on the harmful loss the weights are moved.
        lambda_rule: how λ_t is found from g_a = ∇L_align and d = ∇L_sharp. "theorem": max(0, (a_t − ⟨g_a, d⟩) / ‖d‖²), Theorem 4.1.
            "code": max(0, ξ − cos(g_a, d)), what the published code computes. "constant": ξ, which without the refusal loss is Booster.
        xi: ξ >= 0.
        a_t: for "theorem", a number in place of ξ‖d‖².
        ema_momentum: λ_t is this share of the last one and the rest of the new one; None: 0.99 for "code", as published, else 0.
        lambda_refusal: weight >= 0 of the refusal loss at the moved weights.
    """

    rho: float = 0.1
    lambda_rule: str = "theorem"
    xi: float = 5.0
    a_t: float | None = None
    ema_momentum: float | None = None
    lambda_refusal: float = 0.05

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_choice("lambda_rule", self.lambda_rule, RULES)
        for name in ("rho", "xi", "lambda_refusal"):
            check_number(name, getattr(self, name), 0)
        if self.a_t is not None:
            check_number("a_t", self.a_t)
            if self.lambda_rule != "theorem":
                raise HftcoreError(f'a_t is for lambda_rule "theorem", got "{self.lambda_rule}"; leave it out')
        if self.ema_momentum is not None:
            check_number("ema_momentum", self.ema_momentum, 0, 1)

    @property
    def momentum(self) -> float:
        """The share of the last λ_t in the new one."""
        if self.ema_momentum is None:
            return CODE_MOMENTUM if self.lambda_rule == "code" else 0.0
        return self.ema_momentum


class AlignStep(NamedTuple):
    """What a step saw. `sharpness` is L_harm(θ) − L_harm(θ⁺); `lambda_t` is to be given to the next step."""

    loss: Tensor
    harmful_loss: Tensor
    sharpness: Tensor
    refusal_loss: Tensor | None
    lambda_t: float
    cosine: float


def align_step(
    parameters: Parameters,
    align: Pass,
    harmful: Pass,
    refusal: Pass | None,
    settings: AlignSettings,
    last_lambda: float | None = None,
) -> AlignStep:
    """Leave ∇L_align(θ) + λ_t ∇L_sharp(θ) + λ_refusal ∇L_refusal(θ⁺) in `param.grad`; θ is as before, bit for bit.

    θ⁺ = θ − ρ·∇L_harm(θ)/‖∇L_harm(θ)‖ and ∇L_sharp = ∇L_harm(θ) − ∇L_harm(θ⁺), to first order. Four passes, three without the refusal
    loss. Beside the parameters and their `.grad`, at most two copies of the trained parameters exist.

    Args:
        parameters: what is trained, `param.grad` empty.
        align: the pass of refusals to harmful prompts.
        harmful: that of harmful answers to harmful prompts; run twice, on the same data.
        refusal: that of refusals to the same harmful prompts; not run where lambda_refusal is 0, for which it may be None.
        settings: see `AlignSettings`.
        last_lambda: λ of the step before, None at the first.

    Raises:
        HftcoreError: bad settings, or `param.grad` is not empty.
        NonFiniteError: a gradient is NaN or infinite.

    Source: arXiv:2603.00498, Theorem 4.1 and eqs. 10-11. Where d is zero, λ_t does not matter and is 0 (theorem) or ξ (code).
    """
    settings.check()
    losses: list[Tensor] = []
    refused: list[Tensor] = []

    def observed() -> Tensor:
        losses.append(harmful())
        return losses[-1]

    def refuse() -> None:
        if settings.lambda_refusal > 0:
            if refusal is None:
                raise HftcoreError("refusal must be a pass where lambda_refusal is not 0, got None")
            refused.append(refusal())

    change = gradient_change(parameters, observed, -settings.rho, refuse)
    at_moved = Gradients.take(parameters).packed()
    loss = align()
    aligned = Gradients.of(parameters)
    length, of_change, dot = finite_norm(aligned, "the alignment gradient"), change.norm(), aligned.dot(change)
    cosine = dot / (length * of_change) if length * of_change > 0 else 0.0
    lambda_t = _lambda(settings, dot, of_change**2, cosine)
    if last_lambda is not None:
        lambda_t = settings.momentum * last_lambda + (1 - settings.momentum) * lambda_t
    change.add_to_grad(parameters, lambda_t)
    at_moved.add_to_grad(parameters, settings.lambda_refusal)
    return AlignStep(loss, losses[0], losses[0] - losses[1], refused[0] if refused else None, lambda_t, cosine)


def _lambda(settings: AlignSettings, dot: float, square: float, cosine: float) -> float:
    if settings.lambda_rule == "constant":
        return settings.xi
    if settings.lambda_rule == "code":
        return max(0.0, settings.xi - cosine)
    if square == 0:
        return 0.0
    wanted = settings.xi * square if settings.a_t is None else settings.a_t
    return max(0.0, (wanted - dot) / square)
