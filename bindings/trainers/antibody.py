"""Trainers of Antibody, both stages; the rules are in `hftcore.defenses.antibody_align` and `hftcore.defenses.antibody`."""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer, pad_token
from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.likelihood import Likelihoods, following
from hftcore.bindings.trainers.refusal import RefusalCollator, WithRefusals, refusal_tokens, split
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.antibody import (
    RunningSoftmax,
    WeightSettings,
    attenuation,
    coefficients,
    log_ratios,
    running_bound,
)
from hftcore.defenses.antibody_align import AlignSettings, align_step
from hftcore.defenses.perturbation import Gradients
from hftcore.errors import HftcoreError
from hftcore.grad_norms import capture_grad_norms
from hftcore.shards import is_sharded

log = logging.getLogger("hftcore")

Refusals = Sequence[str] | Sequence[Sequence[int]] | None


@dataclass
class AntibodyAlignConfig(AlignSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `AlignSettings`."""


class AntibodyAlignTrainer(DefenceTrainer):
    """Alignment with Antibody: see `hftcore.defenses.antibody_align.align_step`, which is its training step.

    Args:
        model, args, train_dataset, …: as for `Trainer`. `train_dataset` is the alignment set: harmful prompts with refusals.
        harmful_dataset: harmful prompts with harmful answers; samples of `input_ids` and `labels`, -100 on the prompt.
        refusals: sentences or token ids for the refusal loss, sample i of `harmful_dataset` getting the i-th, cyclically; None: the
            project's own. Sentences need `processing_class`.

    Raises:
        HftcoreError: no harmful data, samples without prompt or answer, a refusal that does not fit the model's window.
    """

    config = AntibodyAlignConfig
    runs_sharded = True
    args: AntibodyAlignConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        harmful_dataset: Any = None,
        refusals: Refusals = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        self._refuses = self.args.lambda_refusal > 0
        collate = None
        if self._refuses and harmful_dataset is not None:
            ids = refusal_tokens(self.processing_class, refusals)
            harmful_dataset = WithRefusals("harmful_dataset", harmful_dataset, ids, _window(self.model))
            collate = RefusalCollator(self.data_collator, pad_token(self.model, self.processing_class))
        self.harmful = self.add_stream("harmful_dataset", harmful_dataset, collate=collate)

    def update(self, batches: list[Batch]) -> Tensor:
        """One `align_step`; λ_t and what it was made of are logged."""
        drawn = [split(batch) for batch in self.draw(self.harmful, len(batches))]
        step = align_step(
            self.parameters,
            align=self.over(batches),
            harmful=self.over([harmful for harmful, _ in drawn]),
            refusal=self.over([refused for _, refused in drawn]) if self._refuses else None,
            settings=self.args,
            last_lambda=self.kept.get("lambda"),
        )
        self.kept["lambda"] = step.lambda_t
        losses = {"loss_harmful": step.harmful_loss, "sharpness": step.sharpness, "loss_refusal": step.refusal_loss}
        self.note(**{name: float(self.shared(loss)) for name, loss in losses.items() if loss is not None})
        self.note(**{"lambda": step.lambda_t, "cosine": step.cosine})
        return step.loss


@dataclass
class AntibodyConfig(WeightSettings, DefenceConfig):
    """`TrainingArguments` with the settings of `WeightSettings`."""


class AntibodyTrainer(DefenceTrainer):
    """Fine-tuning with Antibody's weights, made anew for each batch from the model as it is.

    The likelihoods of answer and refusal come from one forward pass over prompt, answer and refusal, where the model allows that (see
    `Likelihoods`), and the answer's serves the loss as well.

    Args:
        model, args, train_dataset, …: as for `Trainer`; samples of `input_ids` and `labels`, -100 on the prompt.
        refusals: sentences or token ids, sample i of `train_dataset` getting the i-th, cyclically, the same in every epoch; None: the
            project's own. Sentences need `processing_class`.

    Raises:
        HftcoreError: no samples, samples without prompt or answer, a refusal that does not fit the model's window, one sample a softmax,
            or settings that would take the weights away: a loss, model_init, remove_unused_columns, FSDP's cpu_ram_efficient_loading.
    """

    config = AntibodyConfig
    runs_sharded = True
    args: AntibodyConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *,
        refusals: Refusals = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None or getattr(args, "label_smoothing_factor", 0) > 0:
            raise HftcoreError(
                "AntibodyTrainer makes its own loss; leave compute_loss_func and label_smoothing_factor out"
            )
        if kwargs.get("model_init") is not None:
            raise HftcoreError(
                "AntibodyTrainer asks its model how likelihoods are read off it, and model_init makes another in each run; pass model"
            )
        if getattr(args, "remove_unused_columns", False):
            raise HftcoreError(
                "remove_unused_columns=True would take the refusals out of the batches; leave it out, other columns do no harm"
            )
        tokenizer = kwargs.get("processing_class")
        ids = refusal_tokens(tokenizer, refusals)
        if train_dataset is not None:
            train_dataset = WithRefusals("train_dataset", train_dataset, ids, _window(model))
        pad = pad_token(model, tokenizer)
        collator = RefusalCollator(data_collator or Collator(pad), pad)
        super().__init__(model, args, collator, train_dataset=train_dataset, **kwargs)
        self._refuse_single(train_dataset)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HftcoreError(
                "AntibodyTrainer asks its model how likelihoods are read off it, and with cpu_ram_efficient_loading one process alone has "
                "its weights; set cpu_ram_efficient_loading to false in fsdp_config"
            )
        is_watched = self.args.attenuation == "norm"
        self.likelihoods = Likelihoods(self.model, through_head=is_watched and self._trains_head())
        if self.likelihoods.obstacle is None:
            collator.form, collator.longest = "branched", self.likelihoods.window

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Batch], None]:
        """As the Trainer's, but tokens are not counted: the weights set the scale, and batches in "branched" form have no labels."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def update(self, batches: list[Batch]) -> Tensor:
        """The weighted loss of the micro-batches, and its gradient."""
        if self.args.attenuation == "norm":
            return self._attenuated(batches)
        if self.args.weights_over == "step":
            return self._over_step(batches)
        return self.over(batches, lambda model, batch, _: self._loss(model, batch))()

    def _score(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(log-likelihoods, their numbers of tokens, r), each [B]; the first with gradient."""
        if "segments" in batch:
            (sums, counts), refused = self.likelihoods.logprobs(
                model, batch, batch["target_next"], batch["refusal_next"]
            )
        else:
            batch, beside = split(batch)
            with torch.no_grad():
                (refused,) = self.likelihoods.logprobs(self.model, beside, following(beside["labels"]))
            ((sums, counts),) = self.likelihoods.logprobs(model, batch, following(batch["labels"]))
        return sums, counts, log_ratios(sums, counts, *refused, self.args.score)

    def _loss(self, model: Any, batch: Batch) -> Tensor:
        sums, counts, ratios = self._score(model, batch)
        weights = torch.softmax(ratios / self.args.tau, dim=0)
        self._note(ratios, weights)
        return -(coefficients(weights, counts, self.args.scale) * sums).sum()

    def _over_step(self, batches: list[Batch]) -> Tensor:
        """One softmax over the samples of all micro-batches and processes, in one pass: gradients are rescaled as r grows."""
        softmax = RunningSoftmax(self.args.tau)
        loss = tokens = torch.zeros((), device=self.args.device)
        seen = []
        for index, batch in enumerate(batches):
            # what FSDP2 has yet to exchange is not in param.grad, and would not be rescaled
            exchanges = index == len(batches) - 1 or self.is_fsdp_enabled
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(self.model_wrapped):
                sums, counts, ratios = self._score(self.model_wrapped, batch)
                everyone = self._everyone(ratios)
                factor = softmax.add(everyone)
                Gradients.of(self.parameters).scale_(factor)
                numbers = softmax.numbers(ratios)
                loss, tokens = loss * factor, tokens * factor
                own = -(numbers * (sums / counts if self.args.scale == "eq12-mean" else sums)).sum()
                self.accelerator.backward(own)
            loss = loss + own.detach()
            tokens = tokens + self._everyone(numbers * counts).sum()
            seen.append(everyone)
        # processes averaged their gradients, and the loss is a sum over them
        scale = self.args.world_size / (float(tokens) if self.args.scale == "code" else softmax.total)
        Gradients.of(self.parameters).scale_(scale)
        together = torch.cat(seen)
        self._note(together, softmax.numbers(together) / softmax.total)
        return loss * scale

    def _attenuated(self, batches: list[Batch]) -> Tensor:
        """Weights times min(1, C / ‖∇ℓ_i‖), from one backward pass that finds the norms."""
        loss = torch.zeros((), device=self.args.device)
        for batch in batches:
            with capture_grad_norms(self.model, loss="share", norms_only=True, keep=True) as norms:
                sums, counts, ratios = self._score(self.model, batch)
                means = -sums / counts
                means.sum().backward()
            weights = torch.softmax(ratios / self.args.tau, dim=0)
            found = self._everyone(norms.per_sample)
            bound, self.kept["norms"] = running_bound(found, self.kept.get("norms", torch.zeros(0)), self.args)
            bounded = attenuation(norms.per_sample, bound)
            pull = coefficients(weights, counts, self.args.scale) * counts * bounded / len(batches)
            norms.backward(pull)
            loss += (pull * means.detach()).sum()
            self._note(ratios, weights)
            self.note(grad_norm_median=float(found.median()), attenuated=float((bounded < 1).float().mean()))
        if self.args.world_size > 1:
            for parameter in self.parameters.values():
                if is_sharded(parameter):
                    continue  # norms.backward left it the mean
                # an expert may have been used in one process only, and all must take part
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, reduction="mean")
        return loss

    def _everyone(self, values: Tensor) -> Tensor:
        """The values [B] of all processes, whose B may differ."""
        if self.args.world_size == 1:
            return values.detach()
        gathered = self.accelerator.gather(
            self.accelerator.pad_across_processes(values.detach(), pad_index=float("nan"))
        )
        return gathered[~gathered.isnan()]

    def _note(self, ratios: Tensor, weights: Tensor) -> None:
        # 1 / sum of squares: how many samples of equal weight would pull as unevenly
        effective = 1 / weights.double().square().sum()
        self.note(log_ratio=float(ratios.mean()), effective_samples=float(effective))

    def _refuse_single(self, dataset: Any) -> None:
        size = self.args.per_device_train_batch_size
        if self.args.weights_over == "step":
            size *= self.args.gradient_accumulation_steps * self.args.world_size
        if size < 2:
            raise HftcoreError(
                "per_device_train_batch_size=1 gives every sample the weight 1, so the defence is off; take at least 2, or "
                'weights_over="step" with gradient accumulation'
            )
        if dataset is not None and len(dataset) == 0:
            raise HftcoreError("train_dataset is empty; give at least two samples")
        if dataset is not None and len(dataset) % size == 1 and not self.args.dataloader_drop_last:
            log.warning(
                "the last batch of an epoch has one sample, whose weight is always 1; set dataloader_drop_last=True"
            )

    def _trains_head(self) -> bool:
        head = self.model.get_output_embeddings()
        return any(parameter.requires_grad for parameter in head.parameters())


def _window(model: Any) -> int | None:
    """The most tokens a model takes, where its configuration says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)
