"""Trainer of RepNoise; the rule is in `hftcore.defenses.repnoise`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bindings.trainers.base import DefenceConfig
from hftcore.bindings.trainers.pairs import PairTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.hidden import MLP, block_parts, captured, need_gradient
from hftcore.defenses.pairs import IGNORED, masked_logits_loss
from hftcore.defenses.repnoise import RepNoiseSettings, layer_losses, repnoise_penalty
from hftcore.errors import HftcoreError
from hftcore.kernels.products import widened
from hftcore.layers import body

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass
class RepNoiseConfig(RepNoiseSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `RepNoiseSettings`."""


class RepNoiseTrainer(PairTrainer):
    """Alignment with RepNoise: learn harmless answers, turn the hidden states of harmful ones into noise.

    The noise loss compares the samples of a micro-batch with each other and the harmful loss stands in a logarithm, so unlike elsewhere
    the size of a micro-batch is part of the method; the penalty is the mean over micro-batches and processes.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` holds pairs, see `pair_samples`, padded on the right.

    Raises:
        HftcoreError: a model without MLPs, final norm or linear head of a known name; samples without `harmful_ids`.
    """

    config = RepNoiseConfig
    args: RepNoiseConfig

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        super().__init__(model, args, *others, **kwargs)
        self._features = block_parts(self.model, MLP)
        self._reads = self.args.lens and self.args.alpha > 0
        if self._reads:
            self._norm, self._head = _final_norm(self.model), self.model.get_output_embeddings()
            if not isinstance(self._head, nn.Linear):
                raise HftcoreError("the model's output head is not an nn.Linear; use lens=False")

    def update(self, batches: list[Batch]) -> Tensor:
        """The harmless pass and the harmful one; the harmless loss and the penalty are logged, and their sum is the loss."""
        harmless, harmful = self.split(batches, self.args.mask_rule)
        penalty = None
        if self.args.alpha > 0 or self.args.beta > 0:
            count = len(harmful)

            def averaged(model: nn.Module, batch: Batch, number: Any) -> Tensor:
                return self._penalty(model, batch) / (1 if number is None else count)

            penalty = self.over(harmful, averaged)()
        loss = self.over(harmless, self.pair_loss)()
        if penalty is None:
            return loss
        self.note(loss_harmless=float(self.shared(loss)), penalty=float(self.shared(penalty)))
        return loss + penalty

    def _penalty(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of one micro-batch of harmful answers."""
        differs, labels = batch.pop("differs"), batch.pop("labels")
        count = (labels[:, 1:] != IGNORED).sum()
        # a position whose logits count as zero: none, or what the published code masks
        seen = differs if self.args.mask_rule == "code" else torch.ones_like(differs)
        with captured(self._features) as features:
            output = model(**batch, output_hidden_states=self._reads, use_cache=False)
        if self.args.beta > 0:
            need_gradient(features.values())
        final = masked_logits_loss(widened(output.logits), labels, seen) / count
        others: list[Tensor] = []
        if self._reads:
            uniform = torch.nn.functional.pad(~seen[:, :-1], (1, 0))
            soft_cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
            others = layer_losses(output.hidden_states, self._norm, self._head, labels, uniform, soft_cap)
        # noise opposite padding is of no use, though the published code makes it
        counted = differs if self.args.mask_rule == "code" else differs & batch["attention_mask"].bool()
        return repnoise_penalty(features, counted, final, others, self.args)


def _final_norm(model: nn.Module) -> nn.Module:
    inner = body(model)
    for name in NORMS:
        if hasattr(inner, name):
            found: nn.Module = getattr(inner, name)
            return found
    raise HftcoreError(f"{type(inner).__name__} has no final norm named {' or '.join(NORMS)}; use lens=False")
