"""Trainer of Vaccine; the rule is in `hftcore.defenses.vaccine`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.hidden import ATTENTION, block_parts
from hftcore.defenses.vaccine import Begin, VaccineSettings, vaccine_step


@dataclass
class VaccineConfig(VaccineSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `VaccineSettings`."""


class VaccineTrainer(DefenceTrainer):
    """Alignment with Vaccine: see `vaccine_step`, which is its training step.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the alignment set.

    Raises:
        HftcoreError: the model's blocks have no attention of a known name.
    """

    config = VaccineConfig
    args: VaccineConfig

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        super().__init__(model, args, *others, **kwargs)
        self._attention = block_parts(self.model, ATTENTION)

    def update(self, batches: list[Batch]) -> Tensor:
        """One `vaccine_step`."""

        def runs(own: nn.Module | None) -> Any:
            def run(begin: Begin) -> Tensor:
                numbers = iter(range(len(batches)))

                def loss(model: nn.Module, batch: Batch, number: Any) -> Tensor:
                    begin(next(numbers))
                    return self.own_loss(own or model, batch, number)

                return self.over(batches, loss)()

            return run

        def total(value: Tensor) -> Tensor:
            return self.accelerator.reduce(value, reduction="sum")

        # the first pass goes round the wrapper that exchanges gradients: there are none
        return vaccine_step(self.parameters, self._attention, runs(self.model), runs(None), self.args.rho, total)
