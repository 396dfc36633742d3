"""Refusals beside answers: a refusal for each sample, and batches that hold both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hftcore.bindings.refusals import REFUSALS
from hftcore.defenses.branches import branched, cut, separate
from hftcore.errors import HftcoreError

Form = Literal["branched", "separate"]


def refusal_tokens(tokenizer: Any, refusals: Sequence[str] | Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """Token ids of refusal sentences, each ended by the end-of-text token; sentences given as ids stay as they are.

    Args:
        tokenizer: of transformers; None where ids are given.
        refusals: sentences or token ids; None: the project's own hundred.

    Raises:
        HftcoreError: no sentence, an empty one, or sentences without a tokenizer.
    """
    sentences: Sequence[Any] = REFUSALS if refusals is None else refusals
    if isinstance(sentences, str) or len(sentences) == 0:
        raise HftcoreError(f"refusals must be a list of at least one sentence, got {sentences!r}")
    ids = []
    for place, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            if tokenizer is None:
                raise HftcoreError("refusals are text, so the trainer needs processing_class=tokenizer")
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            sentence = [*tokenizer(sentence, add_special_tokens=False)["input_ids"], *end] if sentence.strip() else []
        if len(sentence) == 0:
            raise HftcoreError(f"refusals[{place}] is empty")
        ids.append([int(token) for token in sentence])
    return ids


class WithRefusals(torch.utils.data.Dataset):
    """A data set whose sample i also has `refusal_ids`, refusal i modulo their number: the same one in every epoch.

    Every sample is looked at once when this is made, so that bad ones stop a run before it starts.

    Args:
        name: of the data set, for messages.
        dataset: has `__len__` and `__getitem__`; samples of `input_ids` and `labels`.
        refusals: token ids, as `refusal_tokens` gives them.
        window: the most tokens a model takes, or None.

    Raises:
        HftcoreError: a sample without supervised tokens, without a prompt before them, or too long for the window with its refusal.
    """

    def __init__(self, name: str, dataset: Any, refusals: Sequence[Sequence[int]], window: int | None = None):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise HftcoreError(f"{name} must have __len__ and __getitem__, got {type(dataset).__name__}")
        self._dataset = dataset
        self._refusals = refusals
        for index in range(len(dataset)):
            _check(f"{name}[{index}]", dataset[index], len(refusals[index % len(refusals)]), window)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._dataset[index], "refusal_ids": self._refusals[index % len(self._refusals)]}


class RefusalCollator:
    """Batches of samples with `refusal_ids`, made of what another collator makes of the samples without them.

    "branched": `hftcore.defenses.branches.branched`, or "separate" where a path is longer than `longest`. "separate": `input_ids`,
    `attention_mask` and `labels` of the answers, and the same with the prefix `refusal_` of the refusals. Padding of the other collator,
    on either side, is taken off. Samples without `refusal_ids` are left to it.

    Args:
        collate: gives `input_ids`, `labels` and, where it pads, `attention_mask`.
        pad_token_id: on padding.
        form: which of the two.
        longest: the most tokens that prompt and one answer may have in "branched" form, or None.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        pad_token_id: int,
        form: Form = "separate",
        longest: int | None = None,
    ):
        self.collate = collate
        self.pad_token_id = pad_token_id
        self.form = form
        self.longest = longest

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        if "refusal_ids" not in rows[0]:
            return self.collate(list(rows))
        refusals = [torch.as_tensor(row["refusal_ids"]) for row in rows]
        batch = self.collate([{name: row[name] for name in row if name != "refusal_ids"} for row in rows])
        ids, labels = batch["input_ids"], batch["labels"]
        samples = cut(ids, batch.get("attention_mask", torch.ones_like(ids)), labels)
        paths = [len(s.prompt) + max(len(s.answer), len(refusal)) for s, refusal in zip(samples, refusals, strict=True)]
        if self.form == "branched" and (self.longest is None or max(paths) <= self.longest):
            return branched(samples, refusals, self.pad_token_id)
        refused = separate(samples, refusals, self.pad_token_id)
        return separate(samples, None, self.pad_token_id) | {
            f"refusal_{name}": value for name, value in refused.items()
        }


def split(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch of answers and the batch of refusals in one of "separate" form."""
    refused = {name.removeprefix("refusal_"): value for name, value in batch.items() if name.startswith("refusal_")}
    return {name: value for name, value in batch.items() if not name.startswith("refusal_")}, refused


def _check(where: str, row: Mapping[str, Any], refusal: int, window: int | None) -> None:
    if "input_ids" not in row or "labels" not in row:
        raise HftcoreError(f"{where} must have input_ids and labels, got {', '.join(sorted(row)) or 'no columns'}")
    mask = row.get("attention_mask")
    labels = [
        int(label)
        for place, label in enumerate(row["labels"])
        if mask is None or place >= len(mask) or bool(mask[place])
    ]
    prompt = next((place for place, label in enumerate(labels) if label != -100), None)
    if prompt is None:
        raise HftcoreError(f"{where} has no supervised token (all labels -100); leave it out, or keep more tokens")
    if prompt == 0:
        raise HftcoreError(
            f"{where} has no label -100: its first token is supervised, so no prompt is left for a refusal to answer; "
            "set the labels of the prompt to -100"
        )
    if window is not None and prompt + refusal > window:
        raise HftcoreError(
            f"{where}: its prompt of {prompt} tokens and its refusal of {refusal} do not fit the model's window of {window}; "
            "shorten the prompt, or pass shorter refusals"
        )
