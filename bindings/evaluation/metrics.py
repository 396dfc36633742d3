"""Numbers with their uncertainty: shares and means with 95 % intervals, and what two of them differ by.

Every score of an evaluation is a `Share` or a `Mean`; both have `value`, `interval` and `to_dict()`, and `from_dict` reads either back.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hftcore.errors import HftcoreError

NORMAL_95 = 1.959964
RESAMPLES = 1000


class Score(Protocol):
    """A number and its 95 % interval."""

    @property
    def value(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Share:
    """`count` of `total`, in percent."""

    count: int
    total: int

    @property
    def percent(self) -> float:
        """From 0 to 100; NaN when nothing was counted."""
        return 100.0 * self.count / self.total if self.total else math.nan

    @property
    def value(self) -> float:
        """`percent`."""
        return self.percent

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in percent."""
        low, high = wilson(self.count, self.total)
        return 100.0 * low, 100.0 * high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval
        return {
            "count": self.count,
            "total": self.total,
            "percent": round(self.percent, 2) if self.total else None,
            "low": round(low, 2),
            "high": round(high, 2),
        }


@dataclass(frozen=True)
class Mean:
    """A mean (or what a monotone function makes of it) over `total` items, with a 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.low, self.high

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in full precision."""
        return {"value": self.value, "low": self.low, "high": self.high, "total": self.total}


def from_dict(record: dict[str, Any]) -> Share | Mean:
    """The score that `to_dict` wrote.

    >>> from_dict(Share(1, 4).to_dict())
    Share(count=1, total=4)
    """
    if "count" in record:
        return Share(record["count"], record["total"])
    return Mean(record["value"], record["low"], record["high"], record["total"])


def wilson(count: int, total: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The Wilson score interval of a share, inside [0, 1] also at 0 and at `total`.

    Args:
        count: successes, 0 to `total`.
        total: trials; at 0 the interval is (0, 1).
        z: the normal quantile; the default is for 95 %.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> tuple(round(bound, 3) for bound in wilson(0, 60))
    (0.0, 0.06)
    """
    if not 0 <= count <= total:
        raise HftcoreError(f"count must be from 0 to total = {total}, got {count}")
    if not total:
        return 0.0, 1.0
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Mean:
    """The mean of `values` with the 95 % percentile interval of its bootstrap.

    Args:
        values: one number an item, at least one. With a single item the interval has no width, which says nothing about certainty.
        resamples: how often the items are drawn again, with replacement.
        seed: of the draws; the same values give the same interval.

    Source: Efron and Tibshirani 1993, An introduction to the bootstrap, section 13.3.

    >>> bootstrap_mean([2.0, 2.0, 2.0])
    Mean(value=2.0, low=2.0, high=2.0, total=3)
    """
    if not values:
        raise HftcoreError("values must hold at least one number, got none")
    draw = random.Random(seed)
    size = len(values)
    means = sorted(math.fsum(draw.choices(values, k=size)) / size for _ in range(resamples))
    cut = round(0.025 * (resamples - 1))
    return Mean(math.fsum(values) / size, means[cut], means[resamples - 1 - cut], size)


def bootstrap_difference(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Mean:
    """The mean of `ours` minus that of `theirs`, with the 95 % percentile interval over items drawn as pairs.

    A difference whose interval holds 0 is no difference that these items show.

    Args:
        ours, theirs: one number an item, in the same order of the same items.
        resamples, seed: as for `bootstrap_mean`.

    >>> bootstrap_difference([1.0, 1.0], [0.0, 0.0])
    Mean(value=1.0, low=1.0, high=1.0, total=2)
    """
    if len(ours) != len(theirs):
        raise HftcoreError(f"ours and theirs must be of the same items, got {len(ours)} and {len(theirs)}")
    return bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)], resamples=resamples, seed=seed)


def bootstrap_runs(runs: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> Mean:
    """The mean over runs of an experiment and the items in each, with the 95 % interval over both: runs are drawn again, then their items.

    With one run, how much runs differ is not known, and the interval is that of its items alone.

    Args:
        runs: for each run (seed) one number an item; the same items in each. For a difference, pass the differences.
        resamples, seed: as for `bootstrap_mean`.

    >>> bootstrap_runs([[1.0, 1.0], [1.0, 1.0]])
    Mean(value=1.0, low=1.0, high=1.0, total=4)
    """
    if not runs or len({len(run) for run in runs}) != 1 or not runs[0]:
        raise HftcoreError(f"runs must have the same items, at least one, got {[len(run) for run in runs]}")
    draw = random.Random(seed)
    size = len(runs[0])
    means = []
    for _ in range(resamples):
        drawn = draw.choices(runs, k=len(runs))
        places = draw.choices(range(size), k=size)
        means.append(math.fsum(run[place] for run in drawn for place in places) / (len(runs) * size))
    means.sort()
    cut = round(0.025 * (resamples - 1))
    value = math.fsum(number for run in runs for number in run) / (len(runs) * size)
    return Mean(value, means[cut], means[resamples - 1 - cut], len(runs) * size)
