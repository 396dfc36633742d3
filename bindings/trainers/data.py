"""Texts to the samples a defence's trainer takes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hftcore.bindings.data import Sample, make_batches


def tokenize(samples: Sequence[Sample], tokenizer: Any, max_length: int = 256) -> list[dict[str, Tensor]]:
    """One dict of 1-D `input_ids`, `attention_mask` and `labels` for each sample; see `make_batches`, whose rules these are.

    Args:
        samples: what `hftcore.bindings.data.load_samples` returned.
        tokenizer: of transformers.
        max_length: tokens that are kept, >= 1; the papers' setting is 256.

    Raises:
        HftcoreError: as `make_batches`.
    """
    alone = make_batches(samples, tokenizer, batch_size=1, max_length=max_length)
    return [{name: value[0] for name, value in batch.items()} for batch in alone]
