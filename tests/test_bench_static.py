"""Code inspected without a GPU: the arithmetic of occupancy and roofline, and that `bench/STATIC.md` is sound and up to date."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")
import triton

from hftcore.bench import static
from hftcore.bench.__main__ import app
from hftcore.bench.gpus import GPUS, LIMITS, Gpu, occupancy, roofline
from hftcore.bench.job import Work

DOCUMENT = Path(__file__).resolve().parent.parent / "bench" / "STATIC.md"
ROUND = Gpu("round", "sm_90", units=10, clock=1e9, bandwidth=1e12, tensor=1e14, lanes=100, fused=50)
# helpers that touch a few bytes a column, and blocks too narrow for a wide load
NARROW = ("combine", "pack", "block_scores 4x4")


def rows(heading: str) -> list[list[str]]:
    """The cells of a table of the document, without its header."""
    lines = DOCUMENT.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "share"),
    [
        ("sm_90", 255, 0, 8, 8 / 64),  # 256 x 32 x 8 registers: one program of 65,536
        ("sm_90", 128, 0, 8, 16 / 64),
        ("sm_90", 32, 0, 1, 32 / 64),  # as many programs as there may be
        ("sm_90", 32, 113 << 10, 4, 8 / 64),  # two programs share 228 kB, of which each takes one more
        ("sm_80", 32, 164 << 10, 4, 0),  # one kB too many
        ("gfx942", 128, 0, 4, 16 / 32),  # 4 wavefronts of 512 / 128 on each of four SIMDs
        ("gfx942", 16, 16 << 10, 4, 16 / 32),  # four programs share 64 kB
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(target, registers, shared, warps, share):
    assert occupancy(target, registers, shared, warps) == share


def test_the_roofline_is_the_slowest_of_three():
    assert roofline(ROUND, Work(bytes=10**12, products=10**13, steps=10**11), True) == (1.0, "memory")
    assert roofline(ROUND, Work(bytes=10**11, products=3 * 10**12, steps=10**11), False) == (3.0, "products")
    assert roofline(ROUND, Work(bytes=10**11, products=3 * 10**12, steps=2 * 10**12), True) == (2.0, "steps")


def test_every_gpu_has_limits_and_every_target_a_gpu():
    assert {gpu.target for gpu in GPUS} == set(LIMITS)


def test_the_document_covers_every_target_and_kernel():
    found = {(row[0], row[2]) for row in rows("What the compilers make of them")}
    kernels = {name.split()[0] for name, _ in found}
    assert {"prune_rows", "prune_groups", "score_histogram", "tie_counts", "cut", "column_energy"} <= kernels
    assert {"grad_norms_sq", "sequence_logprobs"} <= kernels
    for target in LIMITS:
        assert {name.split()[0] for name, at in found if at == target} == kernels


def test_the_document_shows_no_spill_and_wide_loads():
    spilling, narrow = [], []
    for name, dtype, target, _warps, _registers, _shared, spills, bits, *_ in rows("What the compilers make of them"):
        if spills != "0":
            spilling.append((name, dtype, target, spills))
        if bits != "128" and not name.endswith(NARROW):
            narrow.append((name, dtype, target, bits))
    assert spilling == []
    assert narrow == []


def test_the_documents_predictions_are_of_these_cases_and_called_predictions():
    assert rows("Predicted times") == static.predictions()
    assert "Predictions, not measurements" in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_is_up_to_date_for_some_kernels():
    """Of every kernel it would take minutes: `hftcore-bench static --out bench/STATIC.md` makes it anew."""
    if f"triton {triton.__version__}." not in DOCUMENT.read_text(encoding="utf-8"):
        pytest.skip("the document was made with another Triton")
    names = ("prune_groups 2:4", "column_energy 4096", "tie_counts")
    found = [static.row(record) for record in static.compiled(["sm_90"], only=names)]
    assert len(found) >= 2 * len(names)
    written = rows("What the compilers make of them")
    assert [row for row in found if row not in written] == []


def test_a_target_nobody_knows_is_refused():
    done = CliRunner().invoke(app, ["static", "--target", "sm_70"])
    assert done.exit_code == 1
    assert "--target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'" in done.output


def test_small_work_is_called_a_launch():
    tiny = static._prediction(1e-7, "memory"), static._prediction(1e-4, "memory")
    assert tiny == ("< 0.005 (launch)", "0.1 (memory)")
