"""A second data set beside the training set: an endless, reshuffled, repeatable stream of batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hftcore.errors import HftcoreError

Batch = dict[str, Tensor]


class BatchStream:
    """Batch after batch of a data set, shuffled anew each time round; never exhausted.

    The samples are those of one random order after another, so each occurs once before any occurs again. Which batch comes depends on
    `seed` and the number of batches drawn alone: setting `drawn` resumes the stream. Of several processes each takes every
    `world_size`-th batch of one common stream.

    Args:
        name: of the data set, for messages.
        dataset: has `__len__` and `__getitem__`.
        batch_size: samples in a batch, >= 1; a smaller data set gives batches of all its samples.
        collate: makes a batch of a list of samples.
        seed: of the order.
        rank, world_size: this process, and how many there are.

    Raises:
        HftcoreError: an empty data set, or one without a length.

    >>> stream = BatchStream("data", [0, 1, 2, 3], 2, collate=sorted, seed=1)
    >>> sorted(stream.draw() + stream.draw())
    [0, 1, 2, 3]
    """

    def __init__(
        self,
        name: str,
        dataset: Sequence[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise HftcoreError(f"{name} must have __len__ and __getitem__, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise HftcoreError(f"{name} is empty; this defence needs at least one sample of it")
        if batch_size < 1:
            raise HftcoreError(f"the batch size of {name} must be at least 1, got {batch_size}")
        self.name = name
        self.drawn = 0
        self._dataset = dataset
        self._batch_size = min(batch_size, len(dataset))
        self._collate = collate
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self) -> Any:
        """The next batch."""
        start = (self.drawn * self._world_size + self._rank) * self._batch_size
        self.drawn += 1
        return self._collate([self._dataset[self._index(place)] for place in range(start, start + self._batch_size)])

    def _index(self, place: int) -> int:
        """The sample at a place of the endless sequence of orders."""
        turn, within = divmod(place, len(self._dataset))
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed(self._seed + turn)
            self._order = turn, torch.randperm(len(self._dataset), generator=generator).tolist()
        return self._order[1][within]
