"""The few numbers of a result file that README shows, so that they are generated too."""

from statistics import median
from typing import Any

from hftcore.bench.ceiling import IN_PLACE
from hftcore.bench.defences import SFT_STEP
from hftcore.bench.measure import OURS
from hftcore.bench.steps import PLAIN_STEP
from hftcore.bench.targets import Quantity, Target
from hftcore.bench.timing import median_interval
from hftcore.bench.whole import PLAIN

HEADER = ("", "float32", "bfloat16")
UNITS: dict[Quantity, str] = {"ratio": " ×", "speedup": " ×", "extra_mb": " MB"}
LARGE, LAYER, STEP, HEAD = "1gb", "llama-7b.up_proj", "small-llama T128", "smollm2.head"
# (in words, case, shape, quantity, what it is compared with)
ROWS: tuple[tuple[str, str, str, Quantity, str], ...] = (
    ("50 % of every row, 1 GB, time of an in-place `w.mul_(1)`", "prune_rows", LARGE, "ratio", IN_PLACE),
    (
        "50 % of every row, 11008 × 4096, faster than the sort of Wanda's code",
        "prune_rows",
        LAYER,
        "speedup",
        "Wanda-code sort",
    ),
    ("50 % of the whole matrix, 1 GB, time of an in-place `w.mul_(1)`", "prune_matrix", LARGE, "ratio", IN_PLACE),
    (
        "50 % of the whole matrix, 11008 × 4096, faster than `torch.kthvalue` on the scores",
        "prune_matrix",
        LAYER,
        "speedup",
        "flattened torch.kthvalue",
    ),
    ("extra memory, rows, 1 GB", "prune_rows", LARGE, "extra_mb", ""),
    ("extra memory, the whole matrix, 1 GB", "prune_matrix", LARGE, "extra_mb", ""),
    (
        "`antidote` on SmolLM2, 64 × 128 tokens, time of one plain forward pass",
        "antidote",
        "smollm2",
        "ratio",
        PLAIN,
    ),
    (
        "each sample's gradient norm with the gradients, 8 × 128 tokens, time of a plain step",
        "step grad norms",
        STEP,
        "ratio",
        PLAIN_STEP,
    ),
    (
        "log-likelihoods of 4 × 128 tokens, vocabulary 49152, faster than logits and log_softmax",
        "sequence_logprobs",
        HEAD,
        "speedup",
        "logits + log_softmax",
    ),
    (
        "weighted loss of the same with gradients to hidden states and head, faster than logits and cross_entropy",
        "weighted_cross_entropy",
        HEAD,
        "speedup",
        "logits + cross_entropy",
    ),
    *(
        (f"a step of {name.capitalize()}, time of a plain one", f"step {name}", STEP, "ratio", SFT_STEP)
        for name in ("antibody", "panacea", "lisa")
    ),
)


def rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Those of the rows that a file has numbers for: medians, with 95 % intervals where several rounds give one."""
    found = []
    for words, case, shape, quantity, against in ROWS:
        cells = [_cell(Target(case, shape, dtype, quantity, 0, against), lines) for dtype in HEADER[1:]]
        if any(cells):
            found.append([words, *cells])
    return found


def _cell(wanted: Target, lines: list[dict[str, Any]]) -> str:
    find = wanted.among(lines)
    ours, values = find(OURS), wanted.values(find)
    if ours is None or not values:
        return ""
    low, high = median_interval(values)
    interval = "" if low == high else f" [{low:.3g}, {high:.3g}]"
    weak = wanted.caveats(ours)
    return f"{median(values):.3g}{UNITS[wanted.quantity]}{interval}" + (f" ({', '.join(weak)})" if weak else "")
