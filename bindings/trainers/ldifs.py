"""Trainer of LDIFS; the rule is in `hftcore.defenses.ldifs`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.anchors import snapshot
from hftcore.defenses.hidden import MLP, block_parts, captured, need_gradient
from hftcore.defenses.ldifs import FeatureCache, LDIFSSettings, aligned_features, drift_penalty


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
        HftcoreError: the model's blocks have no MLP of a known name, or, at the first step, none of them has a gradient.
    """

    config = LDIFSConfig
    args: LDIFSConfig

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        super().__init__(model, args, *others, **kwargs)
        self._features = block_parts(self.model, MLP)
        self._cache = FeatureCache(self.args.cache_gb)

    def update(self, batches: list[Batch]) -> Tensor:
        """A pass of the loss with the drift penalty, which is logged."""
        if self.args.lam == 0:
            return self.over(batches)()
        if "aligned" not in self.kept:
            self.kept["aligned"] = snapshot(self.parameters)
        drifts: list[float] = []

        def loss(model: nn.Module, batch: Batch, number: Any) -> Tensor:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            aligned = self._aligned(inputs)
            with captured(self._features) as now:
                own = self.own_loss(model, batch, number)
            need_gradient(now.values())
            penalty = drift_penalty(now, aligned, inputs["attention_mask"].bool(), self.args)
            drifts.append(float(penalty.detach()))
            # `over` takes a mean over processes, and where it has no number of tokens over micro-batches too
            return own + penalty * (self.args.world_size * (len(batches) if number is None else 1))

        total = self.over(batches, loss)()
        self.note(drift=sum(drifts))
        return total

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; what was kept of other aligned weights is forgotten."""
        self._cache = FeatureCache(self.args.cache_gb)
        return super().train(*args, **kwargs)

    def _aligned(self, inputs: Batch) -> dict[int, Tensor]:
        def compute() -> dict[int, Tensor]:
            return aligned_features(self.model, self.parameters, self.kept["aligned"], self._features, inputs)

        return self._cache.get(inputs, compute) if self.args.cache_gb else compute()
