"""Every Triton kernel compiles for every target without a device: no spills, 128-bit loads, denormals kept.

The interpreter of `test_triton.py` checks what the kernels mean; this checks what the compilers make of them.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

pytest.importorskip("triton")

from hftcore.bench.static import TARGETS, compiled

# helpers that touch a few bytes a column, far from the main traffic
NARROW = ("combine", "pack", "sequence_logprobs", "weighted_cross_entropy")
# scores order weights only where denormals are kept; a sum of squares may flush them
RANKING = ("prune_rows", "prune_groups", "score_histogram", "tie_counts", "cut", "block_scores", "column_energy")


@cache
def every() -> dict[str, list[dict]]:
    """Of all targets, two compilers at a time: each runs on one core."""
    with ThreadPoolExecutor(2) as compilers:
        return dict(zip(TARGETS, compilers.map(lambda target: compiled([target], few=True), TARGETS), strict=True))


def found(target: str) -> list[dict]:
    return every()[target]


def names(records: list[dict]) -> list[str]:
    return [f"{record['kernel']} {record['dtype']}" for record in records]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    products = {"grad_norms_sq", "sequence_logprobs", "weighted_cross_entropy"}
    assert {name.split()[0] for name in names(found(target))} == {*RANKING, *products}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_to_memory(target):
    spilling = [r for r in found(target) if r["spills"] or r["stack"]]
    assert names(spilling) == []


@pytest.mark.parametrize("target", TARGETS)
def test_contiguous_inputs_are_loaded_128_bits_at_a_time(target):
    narrow = [r for r in found(target) if not r["kernel"].endswith(NARROW) and 2 * r["wide_loads"] < r["loads"]]
    assert names(narrow) == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_ranking_kernel_flushes_denormals(target):
    flushing = [r for r in found(target) if r["flushes"] and r["kernel"].startswith(RANKING)]
    assert names(flushing) == []
