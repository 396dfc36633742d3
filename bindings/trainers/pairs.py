"""Pairs of a harmless and a harmful answer to one prompt, as the trainers that compare them take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bindings.trainers.base import DefenceTrainer, pad_token
from hftcore.bindings.trainers.stream import Batch
from hftcore.defenses.pairs import IGNORED, differing, masked_logits_loss
from hftcore.errors import HftcoreError


def pair_samples(harmless: Sequence[Mapping[str, Any]], harmful: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokenized samples, the harmless ones with the harmful answer to the same prompt as `harmful_ids`.

    Raises:
        HftcoreError: lists of different lengths, or a pair whose prompts, the tokens before the first label, are not the same.

    >>> pair_samples([{"input_ids": [1, 2], "labels": [-100, 2]}], [{"input_ids": [1, 3], "labels": [-100, 3]}])
    [{'input_ids': [1, 2], 'labels': [-100, 2], 'harmful_ids': [1, 3]}]
    """
    if len(harmless) != len(harmful):
        raise HftcoreError(f"harmless and harmful must be as many, got {len(harmless)} and {len(harmful)}")
    for index, (one, other) in enumerate(zip(harmless, harmful, strict=True)):
        if _prompt(one) != _prompt(other):
            raise HftcoreError(
                f"the answers of pair {index} do not follow one prompt; give both the same prompt, labelled -100"
            )
    return [{**one, "harmful_ids": other["input_ids"]} for one, other in zip(harmless, harmful, strict=True)]


def _prompt(sample: Mapping[str, Any]) -> list[int]:
    ids, labels = torch.as_tensor(sample["input_ids"]), torch.as_tensor(sample["labels"])
    answered = (labels != IGNORED).nonzero()
    prompt: list[int] = ids[: int(answered[0]) if len(answered) else len(ids)].tolist()
    return prompt


class PairTrainer(DefenceTrainer):
    """What trainers on pairs share: samples of `input_ids`, `labels` (not looked at) and `harmful_ids`."""

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        super().__init__(model, args, *others, **kwargs)
        self._fill = pad_token(self.model, self.processing_class)

    def split(self, batches: list[Batch], rule: str) -> tuple[list[Batch], list[Batch]]:
        """(harmless, harmful) micro-batches whose labels are the tokens that differ.

        Raises:
            HftcoreError: samples without `harmful_ids`, or none of the step that differ.
        """
        pairs = []
        for batch in batches:
            if "harmful_ids" not in batch:
                raise HftcoreError(
                    f"{type(self).__name__} needs samples with harmful_ids, got {', '.join(sorted(batch))}; make them with "
                    "hftcore.bindings.trainers.pairs.pair_samples"
                )
            harmless = batch["input_ids"], batch["attention_mask"]
            pairs.append(differing(*harmless, batch["harmful_ids"], batch["harmful_mask"], self._fill, rule))
        for side in zip(*pairs, strict=True):
            if not any(bool((batch["labels"] != IGNORED).any()) for batch in side):
                raise HftcoreError(
                    "no pair of a step has answers that differ; look at the data, or take larger batches"
                )
        return [harmless for harmless, _ in pairs], [harmful for _, harmful in pairs]

    def pair_loss(self, model: nn.Module, batch: Batch, number: Any) -> Tensor:
        """The mean loss over the tokens that differ, by the rule of the settings, as `over` wants a loss."""
        differs = batch.pop("differs")
        if getattr(self.args, "mask_rule", "shifted") == "shifted":
            return self.own_loss(model, batch, number)
        labels = batch.pop("labels")
        total = masked_logits_loss(model(**batch).logits, labels, differs)
        if number is None:
            return total / (labels[:, 1:] != IGNORED).sum()
        return total * self.args.world_size / number
