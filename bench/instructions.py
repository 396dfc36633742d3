"""Instructions of the native kernels under callgrind: a second number, that no neighbour can disturb.

Valgrind's machine has no AVX-512, so it is the AVX2 code that is counted, on one thread. Run as a module it makes the calls to be counted.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hftcore.errors import HftcoreError
from hftcore.kernels import native

ROWS, COLUMNS = 64, 4096
ENTRY = "hftcore::{}::run(int, hftcore::Job const&)"  # one library call, by its instruction set


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Op -> one call of the library, on normal weights."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw).to(dtype)
    norm = torch.randn(COLUMNS, generator=draw).exp_()
    mask = torch.empty(ROWS, COLUMNS // 8, dtype=torch.uint8)
    quota = torch.zeros(ROWS, dtype=torch.int64)
    half = 0x3F000000  # the key of the score 0.5
    return {
        "column_energy": lambda: native.column_energy(weight, None),
        "nonfinite": lambda: native.nonfinite(weight, norm, None),
        "prune_rows to a mask": lambda: native.prune_rows(weight, norm, None, COLUMNS // 2, False, mask),
        "prune_groups 2:4 to a mask": lambda: native.prune_groups(weight, norm, None, 2, 4, False, mask),
        "score_histogram": lambda: native.score_histogram(weight, norm, None, half, 12, 1 << 12),
        "tie_counts": lambda: native.tie_counts(weight, norm, None, half),
        "cut to a mask": lambda: native.cut(weight, norm, None, half, quota, False, mask),
    }


def why_not() -> str | None:
    """Why instructions cannot be counted here; None if they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    return None if native.available() else native.reason()


def count() -> dict[str, dict[str, float]]:
    """Op -> dtype -> instructions a weight. Takes a minute or two.

    Raises:
        HftcoreError: no valgrind, no native library, or the count fails.
    """
    reason = why_not()
    if reason:
        raise HftcoreError(f"instructions cannot be counted: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counted"
        entry = ENTRY.format("avx2" if "avx2" in native.simds() else "portable")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no"]
        command += [f"--toggle-collect={entry}", f"--dump-after={entry}", sys.executable, "-P", "-m", __spec__.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        names = [(op, dtype) for dtype in DTYPES for op in calls(dtype)]
        totals: list[float] = []
        for number in range(1, len(names) + 1):
            part = Path(f"{out}.{number}")
            found = re.search(r"^totals: (\d+)", part.read_text(), re.MULTILINE) if part.exists() else None
            if done.returncode or found is None:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise HftcoreError(f"valgrind counted {len(totals)} of {len(names)} calls: {said}")
            totals.append(int(found[1]) / (ROWS * COLUMNS))
    counts: dict[str, dict[str, float]] = {}
    for (op, dtype), total in zip(names, totals, strict=True):
        counts.setdefault(op, {})[str(dtype).removeprefix("torch.")] = total
    return counts


DTYPES = (torch.float32, torch.bfloat16)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for call in calls(dtype).values():
            call()
