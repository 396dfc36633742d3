"""What this release promises, as data: a quantity of a result file and its limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from hftcore.bench.ceiling import IN_PLACE
from hftcore.bench.measure import OURS
from hftcore.bench.timing import paired_ratio
from hftcore.bench.whole import BARE, PLAIN

Find = Callable[[str], "dict[str, Any] | None"]  # variant -> its measurement in the case the target is about


@dataclass(frozen=True)
class Target:
    """One promise.

    Fields:
        quantity: "ratio" is our time over that of `against`, "speedup" its time over ours, "difference_us" ours minus its in
            microseconds, "extra_mb" our peak memory above the start in megabytes.
        limit: at most this; for "speedup" at least.
        threads: the promise is for so many threads; None for any.
    """

    case: str
    shape: str
    dtype: str
    quantity: Literal["ratio", "speedup", "difference_us", "extra_mb"]
    limit: float
    against: str = ""
    device: str = "cpu"
    threads: int | None = 2

    def sentence(self) -> str:
        """What is promised.

        >>> Target("prune_rows", "1gb", "float32", "ratio", 3.0, "copy_").sentence()
        'prune_rows 1gb float32: at most 3 x the time of copy_'
        """
        words = {
            "ratio": f"at most {self.limit:g} x the time of {self.against}",
            "speedup": f"at least {self.limit:g} x faster than {self.against}",
            "difference_us": f"at most {self.limit:g} us above {self.against}",
            "extra_mb": f"less than {self.limit:g} MB of extra memory",
        }
        return f"{self.case} {self.shape} {self.dtype}: {words[self.quantity]}"

    def value(self, find: Find, fastest: bool = False) -> float | None:
        """The measured quantity; None where a measurement is missing.

        Args:
            fastest: of the fastest round of each side, which says more than the median about what a busy machine could do.
        """
        ours, other = find(OURS), find(self.against)
        if ours is None or (self.against and other is None):
            return None
        if self.quantity == "extra_mb":
            return None if ours["extra_bytes"] is None else ours["extra_bytes"] / 1e6
        mine, theirs = ours["times_ms"], other["times_ms"] if other else []
        if fastest:
            mine, theirs = [min(mine)], [min(theirs)]
        if self.quantity == "difference_us":
            return 1e3 * median(a - b for a, b in zip(mine, theirs, strict=False))
        if self.quantity == "speedup":
            return paired_ratio(theirs, mine)
        return paired_ratio(mine, theirs)

    def is_met(self, value: float) -> bool:
        """Whether a measured quantity keeps the promise."""
        return value >= self.limit if self.quantity == "speedup" else value <= self.limit


def _in_place(case: str, dtype: str, ratio: float) -> Sequence[Target]:
    return (
        Target(case, "1gb", dtype, "ratio", ratio, IN_PLACE),
        Target(case, "1gb", dtype, "extra_mb", 8),
    )


TARGETS: tuple[Target, ...] = (
    *_in_place("prune_rows", "float32", 3),
    *_in_place("prune_rows", "bfloat16", 4),
    *(
        Target("prune_rows", "llama-7b.up_proj", dtype, "speedup", 150, "Wanda-code sort")
        for dtype in ("float32", "bfloat16")
    ),
    *_in_place("prune_matrix", "float32", 8),
    *_in_place("prune_matrix", "bfloat16", 12),
    *(
        Target("prune_matrix", "llama-7b.up_proj", dtype, "speedup", 40, "flattened torch.kthvalue")
        for dtype in ("float32", "bfloat16")
    ),
    Target("antidote", "smollm2", "float32", "ratio", 1.1, PLAIN),
    Target("dispatch_column_energy", "dispatch", "float32", "difference_us", 6, BARE, threads=None),
    Target("dispatch_prune", "dispatch", "float32", "difference_us", 6, BARE, threads=None),
    Target("prune_rows", "1gb", "bfloat16", "ratio", 2.5, IN_PLACE, device="cuda", threads=None),
    Target("prune_rows", "llama-7b.up_proj", "bfloat16", "speedup", 15, "Wanda-code sort", device="cuda", threads=None),
)
