"""Trainer of LDIFS; the rule is in `hftcore.defenses.ldifs`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.anchors import snapshot
from hftcore.defenses.hidden import MLP, block_parts, captured
from hftcore.defenses.ldifs import LDIFSSettings, aligned_features, drift_penalty


@dataclass
class LDIFSConfig(LDIFSSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `LDIFSSettings`."""


class LDIFSTrainer(DefenceTrainer):
    """Fine-tuning with LDIFS: the MLPs' outputs are held near those of the model that training started from.

    That model is the trained parameters' first values, kept as one copy, in checkpoints too. The penalty is a sum over the samples of a
    step, however they are spread over micro-batches and processes.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the user's data, `model` is the aligned one.

    Raises:
        HftcoreError: the model's blocks have no MLP of a known name.
    """

    config = LDIFSConfig
    args: LDIFSConfig

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        super().__init__(model, args, *others, **kwargs)
        self._features = block_parts(self.model, MLP)

    def update(self, batches: list[Batch]) -> Tensor:
        """A pass of the loss with the drift penalty, which is logged."""
        if self.args.lam == 0:
            return self.over(batches)()
        if "aligned" not in self.kept:
            self.kept["aligned"] = snapshot(self.parameters)
        drifts: list[float] = []

        def loss(model: nn.Module, batch: Batch, number: Any) -> Tensor:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            aligned = aligned_features(self.model, self.parameters, self.kept["aligned"], self._features, inputs)
            with captured(self._features) as now:
                own = self.own_loss(model, batch, number)
            penalty = drift_penalty(now, aligned, inputs["attention_mask"].bool(), self.args)
            drifts.append(float(penalty.detach()))
            # `over` takes a mean over processes, and where it has no number of tokens over micro-batches too
            return own + penalty * (self.args.world_size * (len(batches) if number is None else 1))

        total = self.over(batches, loss)()
        self.note(drift=sum(drifts))
        return total
