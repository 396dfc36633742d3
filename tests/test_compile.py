"""Every Triton kernel compiles for every target without a device: no spills, 128-bit loads, denormals kept.

The interpreter of `test_triton.py` checks what the kernels mean; this checks what the compilers make of them.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# helpers that touch a few bytes a column, far from the main traffic
NARROW = {"column_energy combine"}


@cache
def found(target: str) -> list[dict]:
    """One record a kernel; the process is a fresh one because Triton's interpreter cannot be left."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, target], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(records: list[dict]) -> list[str]:
    return [f"{record['kernel']} {record['dtype']}" for record in records]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    assert {name.split()[0] for name in names(found(target))} == {
        "prune_rows",
        "prune_groups",
        "score_histogram",
        "tie_counts",
        "cut",
        "column_energy",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_to_memory(target):
    assert names([record for record in found(target) if record["spills"] or record["stack"]]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_contiguous_inputs_are_loaded_128_bits_at_a_time(target):
    narrow = [r for r in found(target) if r["kernel"] not in NARROW and 2 * r["wide_loads"] < r["loads"]]
    assert names(narrow) == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_flushes_denormals(target):
    assert names([record for record in found(target) if record["flushes"]]) == []
