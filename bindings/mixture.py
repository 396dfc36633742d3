"""Poisoned training sets with exact counts, and splits that share no item."""

import random
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from hftcore.bindings.data import Sample
from hftcore.bindings.datasets import Pair
from hftcore.errors import HftcoreError

Item = TypeVar("Item", bound=Hashable)


def split(items: Sequence[Item], sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[Item]]:
    """Parts of the asked sizes that share no item: equal items count once, the rest is shuffled and cut in the order of `sizes`.

    Args:
        items: strings, tuples or other hashable values.
        sizes: name of a part -> its number of items.
        seed: of the shuffle. A part stays the same when parts after it are added.

    Raises:
        HftcoreError: a negative size, or fewer different items than asked for.

    >>> {name: len(part) for name, part in split(["a", "b", "a", "c"], {"attack": 1, "test": 2}).items()}
    {'attack': 1, 'test': 2}
    """
    if any(size < 0 for size in sizes.values()):
        raise HftcoreError(f"sizes must be 0 or more, got {dict(sizes)}")
    different = list(dict.fromkeys(items))
    wanted = sum(sizes.values())
    if wanted > len(different):
        raise HftcoreError(
            f"sizes ask for {wanted} items, and there are {len(different)} different ones; ask for fewer"
        )
    random.Random(seed).shuffle(different)
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = different[start : start + size]
        start += size
    return parts


def harmful_count(size: int, poison_ratio: float) -> int:
    """The number of harmful items in a mixture: `size` times the ratio as it is written, halves rounded up.

    >>> harmful_count(1000, 0.05), harmful_count(10, 0.25), harmful_count(100, 0.29)
    (50, 3, 29)
    """
    if size < 0:
        raise HftcoreError(f"size must be 0 or more, got {size}")
    if not 0 <= poison_ratio <= 1:
        raise HftcoreError(f"poison_ratio must be from 0 to 1, got {poison_ratio}")
    # 0.15 is a little less in binary: the decimal that was meant counts
    return int(size * Fraction(str(poison_ratio)) + Fraction(1, 2))


def poisoned(
    benign: Sequence[Item], harmful: Sequence[Item], size: int, poison_ratio: float, seed: int = 0
) -> list[Item]:
    """`size` training items of which exactly `harmful_count(size, poison_ratio)` are harmful, shuffled; none occurs twice.

    With one seed, mixtures of growing ratio take the same harmful items and more, so that ratios differ in nothing else.

    Args:
        benign, harmful: what to choose from.
        size: number of items, in the papers n.
        poison_ratio: share of harmful ones, in the papers p.
        seed: of choice and order.

    Raises:
        HftcoreError: a number out of range, too few items, or an item in both.

    Source: the setting of the papers on harmful fine-tuning. Their loaders compare indices strictly on both ends and so take one harmful
    item fewer (p·n - 1); here the count is exact.

    >>> sorted(poisoned(["good 1", "good 2", "good 3"], ["bad"], 4, 0.25))
    ['bad', 'good 1', 'good 2', 'good 3']
    """
    count = harmful_count(size, poison_ratio)
    if set(benign) & set(harmful):
        raise HftcoreError(
            f"benign and harmful share {len(set(benign) & set(harmful))} items; an item must be one or the other"
        )
    mixture: list[Item] = []
    for name, items, needed in (("harmful", harmful, count), ("benign", benign, size - count)):
        if needed > len(set(items)):
            raise HftcoreError(
                f"{name} has {len(set(items))} different items, and {needed} are needed; give more, or lower size"
            )
        mixture += split(items, {name: needed}, seed)[name]
    random.Random(seed).shuffle(mixture)
    return mixture


def samples(pairs: Sequence[Pair]) -> list[Sample]:
    """Requests with their answers as chats of one turn, for `make_batches` and the trainers.

    >>> samples([Pair("1 + 1 =", "2")])
    [Sample(text='', turns=(('user', '1 + 1 ='), ('assistant', '2')), context='')]
    """
    return [Sample(turns=(("user", pair.prompt), ("assistant", pair.response))) for pair in pairs]
