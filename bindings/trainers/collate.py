"""Samples of token ids to batches of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hftcore.errors import HftcoreError


class Collator:
    """Pads samples on the right into a batch of `input_ids`, `attention_mask` and `labels`, each [B, T] int64.

    A sample holds `input_ids` and `labels` of one length, -100 where nothing is to be learnt, and optionally `attention_mask`. Other
    columns whose names end in `_ids` are padded to a length of their own, with a mask `…_mask` beside them; the rest is left out.

    >>> Collator(0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])["labels"]
    tensor([[-100,    6],
            [   7, -100]])
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            _check(row)
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        masks = [torch.as_tensor(row.get("attention_mask", [1] * len(own))) for row, own in zip(rows, ids, strict=True)]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad(masks, 0),
            "labels": _pad([torch.as_tensor(row["labels"]) for row in rows], -100),
        }
        for name in rows[0]:
            if name.endswith("_ids") and name != "input_ids":
                own = [torch.as_tensor(row[name]) for row in rows]
                batch[name] = _pad(own, self.pad_token_id)
                batch[name.removesuffix("_ids") + "_mask"] = _pad([torch.ones_like(value) for value in own], 0)
        return batch


def _check(row: Mapping[str, Any]) -> None:
    if "input_ids" not in row or "labels" not in row:
        raise HftcoreError(
            f"a sample must have input_ids and labels, got {', '.join(sorted(row)) or 'no columns'}; "
            "tokenize with hftcore.bindings.trainers.data.tokenize, or pass a data_collator"
        )
    if len(row["input_ids"]) != len(row["labels"]) or len(row["input_ids"]) == 0:
        raise HftcoreError(
            f"input_ids and labels of a sample must have one length, at least 1, got {len(row['input_ids'])} and {len(row['labels'])}"
        )


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
