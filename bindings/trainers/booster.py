"""Trainer of Booster; the rule is in `hftcore.defenses.booster`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.booster import BoosterSettings, booster_step


@dataclass
class BoosterConfig(BoosterSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `BoosterSettings`."""


class BoosterTrainer(DefenceTrainer):
    """Alignment with Booster: see `booster_step`, which is its training step.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the alignment set.
        harmful_dataset: harmful prompts with harmful answers; samples of `input_ids` and `labels`, -100 on the prompt.

    Raises:
        HftcoreError: no harmful data.
    """

    config = BoosterConfig
    args: BoosterConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        harmful_dataset: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        self.harmful = self.add_stream("harmful_dataset", harmful_dataset)

    def update(self, batches: list[Batch]) -> Tensor:
        """One `booster_step`; the harmful loss and its reduction are logged."""
        harmful = self.over(self.draw(self.harmful, len(batches)))
        step = booster_step(self.parameters, self.over(batches), harmful, self.args)
        if step.harmful_loss is not None and step.reduction is not None:
            self.note(loss_harmful=float(self.shared(step.harmful_loss)), reduction=float(self.shared(step.reduction)))
        return step.loss
