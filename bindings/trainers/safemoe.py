"""Trainer of SafeMoE; the rule is in `hftcore.defenses.safemoe`."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.safemoe import SafeMoESettings, last_tokens, routing_divergence
from hftcore.errors import HftcoreError, NonFiniteError


@dataclass
class SafeMoEConfig(SafeMoESettings, DefenceConfig):
    """`TrainingArguments` with the settings of `SafeMoESettings`."""


class SafeMoETrainer(DefenceTrainer):
    """Plain fine-tuning; now and then one pass over a small safety set, whose loss is the routing divergence alone.

    What the aligned routers choose on that set is measured once, when training starts, and kept (in checkpoints too): batches × layers ×
    experts numbers, no second model. The passes take optimizer steps of their own, with the learning rate as it is then.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the user's data, `model` the aligned mixture of experts.
        safety_dataset: harmful instructions; samples of `input_ids` and `labels`, of which only the former count.

    Raises:
        HftcoreError: no safety data, or a model without routers.
    """

    config = SafeMoEConfig
    args: SafeMoEConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        safety_dataset: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        if not hasattr(self.model.config.get_text_config(), "output_router_logits"):
            raise HftcoreError(f"{type(self.model).__name__} has no routers; SafeMoE is for mixtures of experts")
        if safety_dataset is None or len(safety_dataset) == 0:
            raise HftcoreError("SafeMoETrainer needs safety_dataset: at least one sample of input_ids and labels")
        size, world, count = self.args.per_device_train_batch_size, self.args.world_size, len(safety_dataset)
        # every process takes as many, or one would wait for the others for ever
        own = range(self.args.process_index, -(-count // world) * world, world)
        rows = [safety_dataset[index % count] for index in own]
        self._safety = [self.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        self.add_callback(_Passes(self))

    def update(self, batches: list[Batch]) -> Tensor:
        """One plain pass."""
        if "aligned" not in self.kept:
            self.kept["aligned"] = [self._measured(batch) for batch in self._safety]
        return self.over(batches)()

    def align_routers(self) -> None:
        """A pass over the safety set: an optimizer step on the routing divergence of each of its batches."""
        found = []
        for batch, aligned in zip(self._safety, self.kept["aligned"], strict=True):
            batch = self._prepare_inputs(dict(batch))
            with self.compute_loss_context_manager():
                loss = routing_divergence(
                    self._routers(self.model_wrapped, batch), aligned, self.args.tau, self.args.layers
                )
            if not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"the routing divergence is {float(loss)}; lower the learning rate, or look at the data"
                )
            self.accelerator.backward(loss)
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            cast(Any, self.optimizer).step()
            self.model.zero_grad(set_to_none=True)
            found.append(float(loss.detach()))
        self.note(routing_divergence=sum(found) / len(found))

    def _measured(self, batch: Batch) -> list[Tensor]:
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self._routers(self.model, self._prepare_inputs(dict(batch)))
        self.model.train(training)
        return found

    def _routers(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_router_logits=True,
            use_cache=False,
        )
        return last_tokens(output.router_logits, batch["attention_mask"])


class _Passes(TrainerCallback):
    """Calls for the passes when they are due."""

    def __init__(self, trainer: SafeMoETrainer):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not at on_epoch_end, which comes after the checkpoint of an epoch's last step
        if state.global_step % args.every == 0 if args.every else state.epoch == int(state.epoch):
            self._trainer.align_routers()
