"""Vaccine: align under the worst small disturbance of the hidden states.

Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning", arXiv:2402.01109.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hftcore.defenses.hidden import watched
from hftcore.defenses.perturbation import Parameters
from hftcore.defenses.settings import check_number
from hftcore.errors import NonFiniteError
from hftcore.kernels.products import widened

Begin = Callable[[int], None]
Run = Callable[[Begin], Tensor]


@dataclass
class VaccineSettings:
    """Settings of `vaccine_step`, with the published default.

    Attributes:
        rho: ρ >= 0, norm of the disturbance over all layers, samples and tokens of a step; 0 is plain fine-tuning.
    """

    rho: float = 2.0

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("rho", self.rho, 0)


def vaccine_step(
    parameters: Parameters,
    modules: Sequence[nn.Module],
    look: Run,
    run: Run,
    rho: float,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Leave the gradient of L with e_l + ε_l in place of each e_l in `param.grad`, and return that loss.

    e_l are the modules' outputs and ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, …)‖, constants for the gradient. Two passes, the first without
    gradients of the parameters; one where ρ is 0. The gradients of all e_l are held meanwhile: tokens × width × layers.

    Args:
        parameters: what is trained, `param.grad` empty.
        modules: whose outputs are disturbed, in the paper the attention of every block.
        look: the first pass over all micro-batches. It must call the function it is given with the number of each micro-batch before
            that one's forward, and must not exchange gradients between processes.
        run: the second, over the same data, likewise.
        rho: ρ >= 0.
        total: the sum over processes of a 0-d tensor.

    Raises:
        NonFiniteError: the gradient of a hidden state is NaN or infinite.

    Source: eqs. 2-4, algorithm 1. The published code takes the norm for each micro-batch; + 1e-7. A zero gradient disturbs nothing.
    """
    if rho == 0:
        return run(lambda index: None)
    slopes: dict[tuple[int, int], Tensor] = {}
    current = 0

    def begin(index: int) -> None:
        nonlocal current
        current = index

    def record(index: int, state: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        place = current, index
        if not state.requires_grad:
            state.requires_grad_()

        def keep(grad: Tensor) -> None:
            slopes[place] = grad

        state.register_hook(keep)

    for parameter in parameters.values():
        parameter.requires_grad_(False)
    try:
        with watched(modules, record):
            look(begin)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    squares = sum(float(widened(slope).square().sum(dtype=torch.float64)) for slope in slopes.values())
    device = next(iter(parameters.values())).device
    norm = math.sqrt(float(total(torch.tensor(squares, dtype=torch.float64, device=device))))
    if not math.isfinite(norm):
        raise NonFiniteError(
            "the gradient of the hidden states is NaN or infinite; lower the learning rate, or look at the data"
        )

    def disturb(index: int, state: Tensor) -> Tensor | None:
        slope = slopes.get((current, index))
        return None if slope is None or norm == 0 else torch.add(state, slope, alpha=rho / norm)

    with watched(modules, disturb):
        return run(begin)
