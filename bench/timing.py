"""Clocks, interleaved rounds and the witnesses of a noisy machine."""

import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

NOISY_CANARY = 1.25
NOISY_NEIGHBOURS = 0.3
FLUSH_BYTES = 256 << 20  # several times the largest L2 cache of a GPU


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentile of some times, in their unit."""

    median: float
    p20: float
    p80: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours.

    Args:
        values: at least one number, any order.
        share: in [0, 1].

    >>> percentile([4.0, 1.0, 2.0, 3.0, 5.0], 0.8)
    4.2
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float]) -> Summary:
    """Median and spread of `values`.

    >>> summary([3.0, 1.0, 2.0]).median
    2.0
    """
    return Summary(statistics.median(values), percentile(values, 0.2), percentile(values, 0.8))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of one variant's time over another's: both saw the same machine in a round, whatever it was doing.

    Args:
        numerator, denominator: times by round; the rounds that only one of them has are left out.

    >>> paired_ratio([2.0, 20.0, 2.2], [1.0, 10.0])
    2.0
    """
    return statistics.median(paired(numerator, denominator))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with at least 95 % confidence, whatever the distribution: between two of the values.

    Of fewer than six values none is far enough out, and the interval is all of them. Source: the sign test's order statistics.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    (2.0, 8.0)
    """
    ordered = sorted(values)
    n = len(ordered)
    outside, cut = 0.0, 0
    # P(fewer than `cut` of n fair coins) on both sides stays within 5 %
    while cut < n // 2 and outside + 2 * math.comb(n, cut) / 2**n <= 0.05:
        outside += 2 * math.comb(n, cut) / 2**n
        cut += 1
    first = max(0, cut - 1)
    return ordered[first], ordered[n - 1 - first]


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """One variant's time over another's, by round; the rounds that only one of them has are left out."""
    return [a / b for a, b in zip(numerator, denominator, strict=False)]


class Clock:
    """Times calls on one device: the wall clock on the CPU, CUDA events after a flush of the L2 cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def time(self, call: Call, inner: int = 1) -> float:
        """Milliseconds of one call, the mean over `inner` calls in a row; a call of another process is timed there."""
        if hasattr(call, "time"):
            return call.time()
        if self._flush is not None:
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / inner
        start = time.perf_counter_ns()
        for _ in range(inner):
            call()
        return (time.perf_counter_ns() - start) / 1e6 / inner


class Canary:
    """A fixed computation of some two milliseconds on all threads, timed along; it is slower when something else runs too."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._data = torch.linspace(0.1, 1.0, 1 << 20, device=clock.device)
        self._out = torch.empty_like(self._data)
        self.times: list[float] = []
        clock.time(self._compute)

    def _compute(self) -> None:
        torch.sin(self._data, out=self._out)

    def sing(self) -> None:
        """Take one time."""
        self.times.append(self._clock.time(self._compute))

    def slowdown(self) -> float:
        """Median over the fastest: 1.0 on a quiet machine."""
        return statistics.median(self.times) / min(self.times)


class Neighbours:
    """CPU time of other processes since it was made, from /proc/stat; the canary's second witness, good over long spans only.

    What this process started is not another: peers that are packages are timed there.
    """

    def __init__(self) -> None:
        self._start = time.monotonic(), self._busy(), self._own()

    @staticmethod
    def _own() -> float:
        """CPU seconds of this process, its threads, and all that it started."""
        ended = os.times()
        spent = time.process_time() + ended.children_user + ended.children_system
        running = _processes()
        family = [os.getpid()]
        for parent in family:
            for number, (its_parent, ticks) in running.items():
                if its_parent == parent:
                    family.append(number)
                    spent += ticks / os.sysconf("SC_CLK_TCK")
        return spent

    @staticmethod
    def _busy() -> float | None:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float | None:
        """Cores that other processes kept busy on average; None where the system does not tell."""
        wall, busy, own = self._start
        now = self._busy()
        if busy is None or now is None:
            return None
        spent = now - busy - (self._own() - own)
        return max(0.0, spent / max(1e-9, time.monotonic() - wall))


def _processes() -> dict[int, tuple[int, int]]:
    """Process -> its parent, and its CPU time and that of its ended children in clock ticks; empty where the system does not tell."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()  # from the third on: the name may hold anything
        except OSError:  # it ended just now
            continue
        found[int(file.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    return found


def is_noisy(canary: float, neighbours: float | None) -> bool:
    """Whether times taken along these witnesses need a pinch of salt.

    >>> is_noisy(1.05, 0.1), is_noisy(1.05, 0.5), is_noisy(1.6, None)
    (False, True, True)
    """
    return canary > NOISY_CANARY or (neighbours or 0.0) > NOISY_NEIGHBOURS


def interleave(
    variants: Mapping[str, Call],
    clock: Clock,
    restore: Call,
    rounds: int,
    budget_s: float,
    inner: int = 1,
    canary: Canary | None = None,
    always: Collection[str] = (),
) -> dict[str, list[float]]:
    """Times of every variant by round, in milliseconds.

    A round runs each variant once on restored inputs; the order turns by one each round, so that nobody always follows the same
    neighbour. A variant that has used up its budget sits out, after one round at least.

    Args:
        variants: name -> call.
        restore: brings the inputs back; not timed.
        rounds: at least 1.
        budget_s: seconds of timed calls for each variant.
        inner: calls in a row for one time (for calls of microseconds that need no restoring).
        canary: sings before every time.
        always: never sit out.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if name not in always and sum(times[name]) * inner > budget_s * 1000:
                continue
            restore()
            if canary is not None:
                canary.sing()
            times[name].append(clock.time(variants[name], inner))
    return times
