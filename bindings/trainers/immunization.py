"""Trainer of the immunization paper's adversarial loss; the rule is in `hftcore.defenses.immunization`."""

from dataclasses import dataclass

from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig
from hftcore.bindings.trainers.pairs import PairTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.immunization import ImmunizationSettings, immunization_step


@dataclass
class ImmunizationConfig(ImmunizationSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `ImmunizationSettings`."""


class ImmunizationTrainer(PairTrainer):
    """Immunization by the adversarial loss: see `immunization_step`, which is its training step.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` holds pairs, see `pair_samples`, padded on the right.

    Raises:
        HftcoreError: samples without `harmful_ids`, or padded on the left.
    """

    config = ImmunizationConfig
    args: ImmunizationConfig

    def update(self, batches: list[Batch]) -> Tensor:
        """One `immunization_step`; both losses are logged, and their difference is the loss."""
        harmless, harmful = self.split(batches, self.args.mask_rule)
        plain, against = self.over(harmless, self.pair_loss), self.over(harmful, self.pair_loss)
        step = immunization_step(self.parameters, plain, against, self.args.alpha)
        if step.harmful_loss is None:
            return step.loss
        self.note(loss_harmless=float(self.shared(step.loss)), loss_harmful=float(self.shared(step.harmful_loss)))
        return step.loss - self.args.alpha * step.harmful_loss
