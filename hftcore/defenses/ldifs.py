"""LDIFS: fine-tune without letting the features drift from the aligned model's.

Mukhoti et al., "Fine-tuning can cripple your foundation model; preserving features may be the solution", arXiv:2308.13320, as the
harmful-fine-tuning papers use it on language models.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hftcore.defenses.anchors import swapped
from hftcore.defenses.hidden import captured
from hftcore.defenses.perturbation import Parameters
from hftcore.defenses.settings import check_number
from hftcore.kernels.products import widened
from hftcore.layers import body


@dataclass
class LDIFSSettings:
    """Settings of LDIFS, with the published runs' as defaults.

    Attributes:
        lam: λ >= 0; 0 is plain fine-tuning.
        drop_above: a layer's term of this size or more is left out of a micro-batch: None (the method), or the published code's 0.1.
    """

    lam: float = 1e-4
    drop_above: float | None = None

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("lam", self.lam, 0)
        if self.drop_above is not None:
            check_number("drop_above", self.drop_above, 0, is_open=True)


def drift_penalty(
    now: Mapping[int, Tensor], aligned: Mapping[int, Tensor], counted: Tensor, settings: LDIFSSettings
) -> Tensor:
    """Σ_l λ/2 ‖(now_l − aligned_l) over the counted tokens‖², 0-d.

    Args:
        now, aligned: layer -> features [B, T, D]; the gradient goes to `now`.
        counted: [B, T] bool; padding is left out.
        settings: see `LDIFSSettings`.

    >>> now, aligned = {0: torch.full((1, 2, 3), 2.0)}, {0: torch.zeros(1, 2, 3)}
    >>> drift_penalty(now, aligned, torch.tensor([[True, False]]), LDIFSSettings(lam=0.5))
    tensor(3.)
    """
    total = torch.zeros((), device=counted.device)
    for layer, features in now.items():
        away = widened(features[counted] - aligned[layer][counted])
        term = settings.lam / 2 * away.square().sum()
        if settings.drop_above is None or float(term.detach()) < settings.drop_above:
            total = total + term.to(total.device)
    return total


def aligned_features(
    model: nn.Module,
    parameters: Parameters,
    aligned: Mapping[str, Tensor],
    modules: Sequence[nn.Module],
    inputs: Mapping[str, Tensor],
) -> dict[int, Tensor]:
    """The modules' outputs with the aligned weights in the parameters' place: no second model, no gradient, no head, no dropout."""
    with torch.no_grad(), swapped(parameters, aligned), _evaluation(model), captured(modules) as seen:
        body(model)(**inputs, use_cache=False)
    return dict(seen)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
