"""LDIFS: fine-tune without letting the features drift from the aligned model's.

Mukhoti et al., "Fine-tuning can cripple your foundation model; preserving features may be the solution", arXiv:2308.13320, as the
harmful-fine-tuning papers use it on language models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        cache_gb: memory for the aligned model's features of samples that come again, in GB (1e9 bytes) on the device that computes them;
            with 0 they are computed anew at every step. What was found in another batch may differ in the last bits.
        drop_above: a layer's term of this size or more is left out of a micro-batch: None (the method), or the published code's 0.1.
    """

    lam: float = 1e-4
    drop_above: float | None = None
    cache_gb: float = 0.0

    def check(self) -> None:
        """Refuse values out of range, by name."""
        check_number("lam", self.lam, 0)
        check_number("cache_gb", self.cache_gb, 0)
        if self.drop_above is not None:
            check_number("drop_above", self.drop_above, 0, is_open=True)


def drift_penalty(
    now: Mapping[int, Tensor], aligned: Mapping[int, Tensor], counted: Tensor, settings: LDIFSSettings
) -> Tensor:
    """Σ_l λ/2 ‖(now_l − aligned_l) over the counted tokens‖², 0-d.

    Args:
        now: layer -> features [B, T, D], to which the gradient goes.
        aligned: layer -> [C, D], those of the C counted tokens, row by row.
        counted: [B, T] bool; padding is left out.
        settings: see `LDIFSSettings`.

    >>> now, aligned = {0: torch.full((1, 2, 3), 2.0)}, {0: torch.zeros(1, 3)}
    >>> drift_penalty(now, aligned, torch.tensor([[True, False]]), LDIFSSettings(lam=0.5))
    tensor(3.)
    """
    total = torch.zeros((), device=counted.device)
    for layer, features in now.items():
        away = widened(features[counted] - aligned[layer])
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
    """The modules' outputs on the tokens that are no padding, [C, D], with the aligned weights in the parameters' place: no second model,
    no gradient, no head, no dropout."""
    with torch.no_grad(), swapped(parameters, aligned), _evaluation(model), captured(modules) as seen:
        body(model)(**inputs, use_cache=False)
    counted = inputs["attention_mask"].bool()
    return {index: state[counted] for index, state in seen.items()}


class FeatureCache:
    """Aligned features by sample, as many as fit: a batch of samples that were all seen before needs no forward.

    >>> cache = FeatureCache(1e-6)                                                # 1,000 bytes
    >>> batch = {"input_ids": torch.tensor([[5, 6], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    >>> cache.get(batch, lambda: {0: torch.tensor([[1.0], [2.0], [3.0]])})[0].tolist()
    [[1.0], [2.0], [3.0]]
    >>> again = {name: value.flip(0) for name, value in batch.items()}
    >>> cache.get(again, lambda: None)[0].tolist()
    [[3.0], [1.0], [2.0]]
    """

    def __init__(self, gigabytes: float):
        self._left = gigabytes * 1e9
        self._rows: dict[tuple[int, bytes], dict[int, Tensor]] = {}

    def get(self, inputs: Mapping[str, Tensor], compute: Callable[[], dict[int, Tensor]]) -> dict[int, Tensor]:
        """What `compute()` gives for a batch of `input_ids` and `attention_mask`, [B, T], from memory if all its samples are there."""
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
        # where a sample begins counts, as padding on the left moves its positions
        names = [(int(seen.int().argmax()), row[seen].numpy().tobytes()) for row, seen in zip(ids, mask, strict=True)]
        if all(name in self._rows for name in names):
            rows = [self._rows[name] for name in names]
            return {layer: torch.cat([row[layer] for row in rows]) for layer in rows[0]}
        found = compute()
        parts = {layer: state.split(mask.sum(1).tolist()) for layer, state in found.items()}
        for place, name in enumerate(names):
            size = sum(part[place].nbytes for part in parts.values())
            if name not in self._rows and size <= self._left:
                self._rows[name] = {layer: part[place].clone() for layer, part in parts.items()}
                self._left -= size
        return found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
