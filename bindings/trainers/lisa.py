"""Trainer of Lisa; when it does what is in `hftcore.defenses.lisa`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.anchors import pull, snapshot
from hftcore.defenses.lisa import LisaSettings, lisa_turn


@dataclass
class LisaConfig(LisaSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `LisaSettings`."""


class LisaTrainer(DefenceTrainer):
    """Fine-tuning with Lisa: K1 steps on alignment data, K2 on the user's, each pulled towards where the other ended.

    As in the published code the training set's batches go on while alignment data is used, and are not looked at.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the user's data.
        alignment_dataset: prompts with safe answers; samples of `input_ids` and `labels`, -100 on the prompt.

    Raises:
        HftcoreError: no alignment data.
    """

    config = LisaConfig
    args: LisaConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        alignment_dataset: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        self.alignment = self.add_stream("alignment_dataset", alignment_dataset)

    def update(self, batches: list[Batch]) -> Tensor:
        """A pass over one of the two data sets, and the proximal term's gradient; both losses and the term are logged."""
        turn = lisa_turn(self.state.global_step, self.state.max_steps, self.args)
        if turn.is_switch and self.args.rho > 0:
            self.kept["anchor"] = snapshot(self.parameters)
        loss = self.over(self.draw(self.alignment, len(batches)) if turn.is_alignment else batches)()
        self.note(**{"loss_alignment" if turn.is_alignment else "loss_user": float(self.shared(loss))})
        if turn.is_pulled:
            self.note(proximal=float(pull(self.parameters, self.kept["anchor"], self.args.rho)))
        return loss
