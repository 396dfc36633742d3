"""Progress bars: on stderr, after one second, and only in a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Track(Generic[Item]):
    """An iterable that shows how far each pass over it has come; as often iterable as what it wraps.

    Args:
        items: what to go through.
        label: what is being done, in a word or two.
        total: how many there are, when `items` has no length.

    >>> list(Track("ab", "letters"))
    ['a', 'b']
    """

    def __init__(self, items: Iterable[Item], label: str, total: int | None = None) -> None:
        self.items, self.label = items, label
        self.total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("these items have no length")
        return self.total

    def __iter__(self) -> Iterator[Item]:
        if not sys.stderr.isatty():
            yield from self.items
            return
        from tqdm import tqdm

        yield from tqdm(self.items, desc=self.label, total=self.total, delay=1.0, leave=False, file=sys.stderr)
