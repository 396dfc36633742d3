"""Trainer of Panacea; the rule is in `hftcore.defenses.panacea`."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.merged import check_merged, lora_factors
from hftcore.defenses.panacea import PanaceaSettings, panacea_step, step_length
from hftcore.defenses.panacea_perturb import check_movable, displace
from hftcore.defenses.perturbation import Gradients, Pass
from hftcore.edit import Edit
from hftcore.errors import HftcoreError


@dataclass
class PanaceaConfig(PanaceaSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `PanaceaSettings`."""


class PanaceaTrainer(DefenceTrainer):
    """Fine-tuning with Panacea. `train` ends by moving the weights by the last step's ε, and `edit` is that change.

    Checkpoints hold the weights without it. The edit is saved as `edit` in the output folder; `trainer.edit.revert(model)` takes the
    perturbation out again, which training on should begin with. Under FSDP2 `edit` is there on the processes that save and None on the
    others; it fits the whole model.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the user's data.
        harmful_dataset: harmful prompts with harmful answers; samples of `input_ids` and `labels`, -100 on the prompt.

    Raises:
        HftcoreError: no harmful data.
    """

    config = PanaceaConfig
    runs_sharded = True
    args: PanaceaConfig

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
        self.edit: Edit | None = None
        self._factors = lora_factors(self.model)

    def update(self, batches: list[Batch]) -> Tensor:
        """One `panacea_step`; the harmful loss, and how much ε raises it, are logged."""
        # the direction of the step before must not be a third copy of the parameters
        self.kept.clear()
        step = panacea_step(self.parameters, self.over(batches), self._harmful(len(batches)), self.args, self._factors)
        if step.direction is not None and step.harmful_loss is not None and step.moved_loss is not None:
            self.kept |= {"direction": step.direction.tensors, "length": step.length}
            self.note(loss_harmful=float(step.harmful_loss), rise=float(step.moved_loss - step.harmful_loss))
        return step.loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; then the perturbation.

        Raises:
            HftcoreError: before the first step, trained parameters whose perturbation an Edit cannot hold or `space` cannot measure.
        """
        if self.args.rho > 0:
            check_movable(self.parameters)
            if self.args.space == "merged":
                if self.is_fsdp_enabled:
                    raise HftcoreError(
                        'space "merged" needs whole LoRA factors, and FSDP2 cuts them; take space "trained"'
                    )
                check_merged(self.parameters, self._factors)
        result = super().train(*args, **kwargs)
        self.edit = self._perturb()
        if self.edit is not None and self.args.should_save and self.args.output_dir is not None:
            self.edit.save(os.path.join(self.args.output_dir, "edit"))
        return result

    def _harmful(self, count: int) -> Pass:
        """A pass over the next harmful batches, which are drawn when it is first run; the loss is that of all processes."""
        runs: list[Pass] = []

        def run() -> Tensor:
            if not runs:
                runs.append(self.over(self.draw(self.harmful, count)))
            return self.shared(runs[0]())

        return run

    def _perturb(self) -> Edit | None:
        settings = self.args
        recipe = {"method": "panacea", "rho": settings.rho, "lam": settings.lam, "space": settings.space}
        if settings.rho == 0:
            return Edit({}, recipe)
        if "direction" in self.kept:
            direction, length = Gradients(self.kept["direction"]), self.kept["length"]
        else:
            self.model.train()
            self.model.zero_grad(set_to_none=True)
            self._harmful(settings.gradient_accumulation_steps)()
            direction = Gradients.take(self.parameters)
            length = step_length(self.parameters, direction, settings.rho, settings.space, self._factors)
        if direction.norm() == 0:
            warnings.warn("the harmful gradient is zero, so Panacea leaves the weights as they are", stacklevel=3)
        # whole weights are held once a machine
        keeps = self.args.should_save or not self.is_fsdp_enabled
        edit = displace(self.parameters, direction, length, recipe, keeps)
        return edit if keeps else None
