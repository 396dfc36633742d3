"""Plain fine-tuning, the row every defence is compared with."""

from dataclasses import dataclass

from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch


@dataclass
class SFTConfig(DefenceConfig):
    """`TrainingArguments`."""


class SFTTrainer(DefenceTrainer):
    """What `transformers.Trainer` does, bit for bit, with the checks and the data of a defence."""

    config = SFTConfig

    def update(self, batches: list[Batch]) -> Tensor:
        """One pass."""
        return self.over(batches)()
