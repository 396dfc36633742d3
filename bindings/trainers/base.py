"""What the trainers of all defences share: `transformers.Trainer` with the training step handed to the defence."""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.kept import gathered, placed
from hftcore.bindings.trainers.stream import Batch, BatchStream
from hftcore.defenses.perturbation import Parameters, Pass, trained
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.shards import is_sharded

STATE_FILE = "defence_state.pt"
WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod)\.")
Loss = Callable[[nn.Module, Batch, Any], Tensor]


@dataclass
class DefenceConfig(TrainingArguments):
    """`TrainingArguments`, checked; a defence adds its settings.

    A defence's settings are a dataclass in `hftcore.defenses` whose `check()` refuses bad values; its config inherits that one first and
    this one second.
    """

    # the collators here want columns that a model's forward does not take
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Refuse bad settings; a defence's settings have their own."""


class DefenceTrainer(Trainer):
    """A Trainer whose optimizer step is one application of a defence's rule to the whole accumulated batch.

    A defence overrides `update`. Micro-batches are collected until the optimizer is due, so gradient accumulation saves memory and does
    not change the method: every pass of the rule runs over all of them, at the same weights. Works in one process, under
    DistributedDataParallel and, where `runs_sharded` says so, under FSDP2, in float32, bfloat16 and with bf16 autocast.

    Args:
        model, args, train_dataset, …: as for `Trainer`. Without a `data_collator`, samples of `input_ids` and `labels` are padded by
            `Collator`.

    Raises:
        HftcoreError: fp16 loss scaling, FSDP of version 1, DeepSpeed or nn.DataParallel, under which gradients cannot be combined here;
            FSDP2 where the defence is not known to be right; a model that is in parts already.
    """

    config: ClassVar[type[DefenceConfig]] = DefenceConfig
    # FSDP2 has been tried: the same weights as under DistributedDataParallel
    runs_sharded: ClassVar[bool] = False
    model: Any

    def __init__(self, model: Any = None, args: Any = None, data_collator: Any = None, **kwargs: Any):
        if not isinstance(args, self.config):
            raise HftcoreError(f"args must be {self.config.__name__}, got {type(args).__name__}")
        if data_collator is None:
            data_collator = Collator(pad_token(model, kwargs.get("processing_class")))
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self._refuse_unsupported()
        # numbers and tensors of the defence that outlive a step; saved with checkpoints and restored from them
        self.kept: dict[str, Any] = {}
        self._streams: dict[str, BatchStream] = {}
        self._waiting: list[Batch] = []
        self._noted: dict[str, list[float]] = {}

    def update(self, batches: list[Batch]) -> Tensor:
        """Leave the step's gradient in `param.grad`, which is empty at the start, and return the loss to report (0-d, detached).

        Args:
            batches: the micro-batches of this step on this process, on the device.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> Parameters:
        """What is trained, by name, without what activation checkpointing and compilation put in between."""
        return {WRAPPERS.sub("", name): parameter for name, parameter in trained(self.model).items()}

    def add_stream(
        self, name: str, dataset: Sequence[Any] | None, batch_size: int | None = None, collate: Any = None
    ) -> BatchStream:
        """An endless stream over a second data set, of the training's batch size and collator by default; resumed with checkpoints.

        Raises:
            HftcoreError: the data set is None or empty.
        """
        if dataset is None:
            raise HftcoreError(f"{type(self).__name__} needs {name}: samples of input_ids and labels")
        size = batch_size or self.args.per_device_train_batch_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # streams of one trainer must not walk in step
        seed += 7919 * (1 + len(self._streams))
        place = self.args.process_index, self.args.world_size
        self._streams[name] = BatchStream(name, dataset, size, collate or self.data_collator, seed, *place)
        return self._streams[name]

    def draw(self, stream: BatchStream, count: int) -> list[Batch]:
        """The next `count` batches of a stream, on the device."""
        return [self._prepare_inputs(stream.draw()) for _ in range(count)]

    def over(self, batches: list[Batch], loss: Loss | None = None) -> Pass:
        """A pass over micro-batches: forward, backward, `param.grad` grows by the gradient of their common loss, which is returned.

        The loss is the mean over the supervised tokens of all micro-batches and processes, as the Trainer's own.

        Args:
            batches: of one kind, on the device.
            loss: (model, batch, number) -> 0-d, in place of the Trainer's `compute_loss`. `number` counts the supervised tokens of all
                micro-batches and processes: the sum over micro-batches and the mean over processes of what is returned must be the loss
                wanted. Where it is None (models that do not take it), their mean must be.
        """

        def run() -> Tensor:
            model = self.model_wrapped
            number = self.get_batch_samples(iter(batches), len(batches), self.args.device)[1]
            compute = loss or self.own_loss
            total = torch.zeros((), device=self.args.device)
            for index, batch in enumerate(batches):
                # processes exchange gradients once a pass, on its last micro-batch
                is_last = index == len(batches) - 1
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        value = compute(model, dict(batch), number)
                    if number is None:
                        value = value / len(batches)
                    self.accelerator.backward(value)
                total += value.detach()
            return total

        return run

    def own_loss(self, model: nn.Module, batch: Batch, number: Any) -> Tensor:
        """The Trainer's `compute_loss` of a micro-batch, as `over` wants a loss."""
        loss = self.compute_loss(model, batch, num_items_in_batch=number)
        return loss if isinstance(loss, Tensor) else loss[0]

    def shared(self, value: Tensor) -> Tensor:
        """The mean over processes of a 0-d tensor."""
        return self.accelerator.reduce(value, reduction="mean") if self.args.world_size > 1 else value

    def note(self, **numbers: float) -> None:
        """Numbers of this step for the log, which shows their mean since the last entry."""
        for name, value in numbers.items():
            self._noted.setdefault(name, []).append(float(value))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; micro-batches that an interrupted run left behind are forgotten."""
        self._waiting.clear()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect the micro-batch; on the step's last one, run the defence's `update` on all of them."""
        model.train()
        self._waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        loss = self.update(batches)
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {float(loss)}; lower the learning rate, or look at the data"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log entry with the defence's numbers."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._noted.items()}
            self._noted.clear()
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        kept = gathered(self.kept, self.args.should_save)
        if self.args.should_save:
            drawn = {name: stream.drawn for name, stream in self._streams.items()}
            torch.save({"drawn": drawn, "kept": kept}, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise HftcoreError(
                f"checkpoint {checkpoint} has no {STATE_FILE}, so {type(self).__name__} cannot resume from it; "
                "start from its weights instead"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["drawn"].keys() != self._streams.keys():
            raise HftcoreError(
                f"checkpoint {checkpoint} is of a trainer with the data sets {sorted(state['drawn'])}, this one has {sorted(self._streams)}"
            )
        self.kept = placed(state["kept"], self.parameters, self.args.device)
        for name, drawn in state["drawn"].items():
            self._streams[name].drawn = drawn

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise HftcoreError(
                f"the checkpoint's {load_result.unexpected_keys[0]} and {len(load_result.unexpected_keys) - 1} more are stored under other "
                "names than the model's (transformers splits fused experts so), and would not be loaded; train an adapter, or begin "
                "again from the checkpoint's weights with from_pretrained"
            )
        super()._issue_warnings_after_load(load_result)

    def _refuse_unsupported(self) -> None:
        name = type(self).__name__
        if self.args.fp16:
            raise HftcoreError(
                f"{name} combines gradients, which fp16's loss scaling would spoil; use bf16=True instead"
            )
        if self.is_deepspeed_enabled:
            raise HftcoreError(f"{name} runs under DistributedDataParallel and FSDP2, not DeepSpeed; take one of those")
        if self.is_fsdp_enabled and not self.runs_sharded:
            raise HftcoreError(
                f"{name} runs under DistributedDataParallel, and has not been tried under FSDP; on a model that fully_shard (FSDP2) has "
                "cut, call its rule in hftcore.defenses in a loop of your own"
            )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise HftcoreError(f"{name} runs under FSDP2, not FSDP's version 1; set fsdp_config={{'version': 2}}")
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            raise HftcoreError(
                f"{name} got a model that is in parts already; give it a whole one, which fsdp=True in its config lets it cut itself"
            )
        if self.args.n_gpu > 1:
            raise HftcoreError(
                f"{name} does not run under nn.DataParallel; start it with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )


def pad_token(model: Any, tokenizer: Any) -> int:
    """The token to pad with: the tokenizer's, the model's, or 0, as padding is masked anyway."""
    candidates = (
        getattr(tokenizer, "pad_token_id", None),
        getattr(getattr(model, "config", None), "pad_token_id", None),
    )
    return next((token for token in candidates if token is not None), 0)
