"""What this release promises, as data: a quantity of a result file and its limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hftcore.bench.ceiling import IN_PLACE, READ, share
from hftcore.bench.defences import DEFENCES, SFT_STEP
from hftcore.bench.measure import OURS
from hftcore.bench.results import QUICKLY, RUN, WHOLLY
from hftcore.bench.scaling import ALONE, CALIBRATED, ONE, PATTERNS, SIZES, selected
from hftcore.bench.steps import PLAIN_STEP
from hftcore.bench.streaming import COPY, MOST
from hftcore.bench.timing import paired
from hftcore.bench.whole import BARE, PLAIN

Quantity = Literal["ratio", "speedup", "difference_us", "share", "extra_mb", "extra_ratio", "more_mb", "minutes"]
Find = Callable[[str], "dict[str, Any] | None"]  # variant -> its measurement in the case the target is about


@dataclass(frozen=True)
class Target:
    """One promise.

    Fields:
        quantity: "ratio" is our time over that of `against`, "speedup" its time over ours, "difference_us" ours minus its in
            microseconds, "share" that of the ceiling in percent, "extra_mb" our peak memory above the start in megabytes, "extra_ratio"
            that over the peak of `against`, "more_mb" that minus the peak of `against`, "minutes" our time.
        limit: at most this; for "speedup" and "share" at least.
        threads: the promise is for so many threads; None for any.
    """

    case: str
    shape: str
    dtype: str
    quantity: Quantity
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
            "share": f"at least {self.limit:g} % of the ceiling",
            "extra_mb": f"less than {self.limit:g} MB of extra memory",
            "more_mb": f"at most {self.limit:g} MB of extra memory beyond {self.against}",
            "minutes": f"at most {self.limit:g} minutes",
            "extra_ratio": f"at most {self.limit:g} x the extra memory of {self.against}",
        }
        return f"{' '.join(part for part in (self.case, self.shape, self.dtype) if part)}: {words[self.quantity]}"

    def among(self, lines: list[dict[str, Any]]) -> Find:
        """What finds the measurements it is about in a result file."""
        where = (self.case, self.shape, self.dtype, self.device)
        keys = ("case", "shape", "dtype", "device")
        return {line["variant"]: line for line in lines if tuple(line[key] for key in keys) == where}.get

    def caveats(self, ours: dict[str, Any]) -> list[str]:
        """What weakens a measured time, in words."""
        if self.quantity not in ("ratio", "speedup", "difference_us", "share", "minutes"):
            return []
        return ["one round"] * (len(ours["times_ms"]) == 1) + ["noisy"] * ours["noisy"]

    def values(self, find: Find) -> list[float]:
        """The measured quantity, by round where there are rounds; empty where a measurement is missing."""
        ours, other = find(OURS), find(self.against)
        if ours is None or (self.against and (other is None or not other["times_ms"])):
            return []
        if self.quantity == "minutes":
            return [ms / 60e3 for ms in ours["times_ms"]]
        if self.quantity == "extra_mb":
            return [] if ours["extra_bytes"] is None else [ours["extra_bytes"] / 1e6]
        if self.quantity in ("extra_ratio", "more_mb"):
            extra = (ours["extra_bytes"], other["extra_bytes"] if other else None)
            if extra[0] is None or not extra[1]:
                return []
            return [extra[0] / extra[1] if self.quantity == "extra_ratio" else (extra[0] - extra[1]) / 1e6]
        if self.quantity == "share":
            part = share(ours, find)
            return [] if part is None else [100 * part]
        return self._of_times(ours["times_ms"], other["times_ms"] if other else [])

    def fastest(self, find: Find) -> float | None:
        """The quantity of the fastest round of each side, which says more than the median about what a busy machine could do."""
        ours, other = find(OURS), find(self.against)
        if ours is None or other is None or self.quantity not in ("ratio", "speedup", "difference_us"):
            return None
        return self._of_times([min(ours["times_ms"])], [min(other["times_ms"])])[0]

    def _of_times(self, mine: list[float], theirs: list[float]) -> list[float]:
        if self.quantity == "difference_us":
            return [1e3 * (a - b) for a, b in zip(mine, theirs, strict=False)]
        return paired(theirs, mine) if self.quantity == "speedup" else paired(mine, theirs)

    def is_met(self, value: float) -> bool:
        """Whether a measured quantity keeps the promise."""
        return value >= self.limit if self.quantity in ("speedup", "share") else value <= self.limit


def _in_place(case: str, dtype: str, ratio: float) -> Sequence[Target]:
    return (
        Target(case, "1gb", dtype, "ratio", ratio, IN_PLACE),
        Target(case, "1gb", dtype, "extra_mb", 8),
    )


def _step(case: str, shape: str, ratio: float) -> Sequence[Target]:
    return (
        Target(case, shape, "float32", "ratio", ratio, PLAIN_STEP),
        Target(case, shape, "float32", "extra_ratio", 1.05, PLAIN_STEP),
        Target(case, shape, "float32", "speedup", 1, "Opacus ghost clipping"),
        Target(case, shape, "float32", "extra_ratio", 1, "Opacus ghost clipping"),
    )


def _gpu(case: str, shape: str, quantity: Quantity, limit: float, against: str = "") -> Target:
    return Target(case, shape, "bfloat16", quantity, limit, against, device="cuda", threads=None)


TWO_COPIES_MB = 2 * 4 * 33.7  # of the 33.7 million weights of small-llama

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
    *_step("step grad norms", "small-llama T128", 1.05),
    *_step("step grad norms", "small-llama T512", 1.10),
    *_step("step grad norms only", "small-llama T128", 0.75),
    *_step("step grad norms only", "small-llama T512", 0.95),
    *(
        Target(f"step LoRA r{rank} grad norms", f"small-llama T{length}", "float32", "ratio", 1.05, PLAIN_STEP)
        for rank in (8, 32)
        for length in (128, 512)
    ),
    *(
        Target(f"step {name}", "small-llama T128", "float32", "ratio", defence.most, SFT_STEP)
        for name, defence in DEFENCES.items()
        if defence.most is not None
    ),
    *(
        Target(f"step {name}", "small-llama T128", "float32", "more_mb", TWO_COPIES_MB, SFT_STEP)
        for name, defence in DEFENCES.items()
        if not (defence.ending or defence.lora)
    ),
    *(
        Target(f"streaming prune, {scope} scope", "llama-1b", "bfloat16", "ratio", most, COPY, threads=None)
        for scope, most in MOST.items()
    ),
    *(
        Target(f"streaming prune, {scope} scope", "llama-1b", "bfloat16", "extra_mb", 512, threads=None)
        for scope in MOST
    ),
    Target(CALIBRATED, "2", "float32", "speedup", 1.7, ONE, threads=1),
    *(Target(selected(pattern, SIZES[-1]), "2", "bfloat16", "ratio", 1.05, ALONE, threads=1) for pattern in PATTERNS),
    Target(RUN, QUICKLY, "", "minutes", 5),
    Target(RUN, WHOLLY, "", "minutes", 60),
    # 5 % of the float32 logits of 4 x 128 tokens and a vocabulary of 49,152
    Target("sequence_logprobs", "smollm2.head", "float32", "extra_mb", 5.03),
    Target("sequence_logprobs", "smollm2.head", "float32", "speedup", 1, "logits + log_softmax"),
    Target("sequence_logprobs", "smollm2.head", "bfloat16", "extra_mb", 5.03),
    Target("sequence_logprobs", "smollm2.head", "bfloat16", "speedup", 1, "logits + log_softmax"),
    *(
        Target("weighted_cross_entropy", "smollm2.head", dtype, "speedup", 1, "logits + cross_entropy")
        for dtype in ("float32", "bfloat16")
    ),
    # shares of a rate as ratios of times: 75 %, 45 % and 85 %
    _gpu("prune_rows", "1gb", "ratio", 1.33, IN_PLACE),
    _gpu("prune_matrix", "1gb", "ratio", 2.22, IN_PLACE),
    _gpu("column_energy", "tokens-mlp", "ratio", 1.18, READ),
    _gpu("prune_rows", "llama-7b.up_proj", "speedup", 15, "Wanda-code sort"),
    _gpu("calibrate bf16", "llama-3-8b", "ratio", 1.03, PLAIN),
    _gpu("grad_norms_sq", "samples-7b T2048", "share", 50),
)

# promises that no case can hold, for they need kills, a cap on memory or hours: (promise, what measures it)
ELSEWHERE: tuple[tuple[str, str], ...] = (
    ("200 kills of a run on files: nothing lost, nothing repeated", "`hftcore-bench kills`"),
    ("offloaded calibration at a third of the memory: at most 1.25 x reading and computing", "`docs/scaling.md`"),
    ("50 adapters on one base: at least 5 x the throughput of separate runs", "`docs/scaling.md`"),
    ("a 26 GB checkpoint: row scope at most 1.3 x, model scope at most 2.2 x a plain copy", "`docs/scaling.md`"),
    ("no spills, 128-bit loads on sm_80, sm_90, sm_100 and gfx942", "`hftcore-bench static`, `bench/STATIC.md`"),
)
