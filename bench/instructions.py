"""Instructions of the native kernels under callgrind: a second number, that no neighbour can disturb.

Valgrind's machine has no AVX-512, so it is the AVX2 code that is counted, on one thread. Run as a module it makes the calls to be counted.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hftcore.bench.results import Measurement
from hftcore.errors import HftcoreError
from hftcore.kernels import native

ROWS, COLUMNS = 64, 4096
SAMPLES, TOKENS, FEATURES, VOCABULARY = 1, 256, 1024, 1024
CASE, TOOL = "instructions", "callgrind"
ENTRY = "hftcore::{}::run(int, hftcore::Job const&)"  # one library call, by its instruction set
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Counted:
    """One call of a kernel.

    Fields:
        elements: of its input, which the instructions are shared out over.
        passes: how many calls of the library it takes.
    """

    call: Callable[[], object]
    elements: int = ROWS * COLUMNS
    passes: int = 1


def calls(dtype: torch.dtype) -> dict[str, Counted]:
    """Op -> one call on normal weights, or on normal activations of one sample; products of matrices in float32 only."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw).to(dtype)
    norm = torch.randn(COLUMNS, generator=draw).exp_()
    mask = torch.empty(ROWS, COLUMNS // 8, dtype=torch.uint8)
    half_of_them = torch.full_like(mask, 0b01010101)
    values = torch.zeros(ROWS * COLUMNS // 2, dtype=dtype)
    keys = torch.empty(ROWS * COLUMNS, dtype=torch.int32)
    quota = torch.zeros(ROWS, dtype=torch.int64)
    half, one = 0x3F000000, 0x3F800000  # the keys of the scores 0.5 and 1
    halves, ones = (torch.full((ROWS,), key, dtype=torch.int32) for key in (half, one))
    bits = weight.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    found = {
        "column_energy": Counted(lambda: native.column_energy(weight, None)),
        "nonfinite": Counted(lambda: native.nonfinite(weight, norm, None)),
        "prune_rows to a mask": Counted(lambda: native.prune_rows(weight, norm, None, COLUMNS // 2, False, mask)),
        "prune_rows in place": Counted(
            lambda: native.prune_rows(weight.clone(), norm, None, COLUMNS // 2, False, None)
        ),
        "prune_groups 2:4 to a mask": Counted(lambda: native.prune_groups(weight, norm, None, 2, 4, False, mask)),
        "score_histogram": Counted(lambda: native.score_histogram(weight, norm, None, half, 12, 1 << 12)),
        "sampled_keys, one in 64": Counted(lambda: native.sampled_keys(weight, norm, None, 0, 64)),
        "keys_between 0.5 and 1": Counted(lambda: native.keys_between(weight, norm, None, half, one, keys)),
        "tie_counts": Counted(lambda: native.tie_counts(weight, norm, None, half)),
        "row_keys": Counted(lambda: native.row_keys(weight, norm, None, COLUMNS // 2)),
        "row_counts 0.5 and 1": Counted(lambda: native.row_counts(weight, norm, None, halves, ones, keys)),
        "row_cut to a mask": Counted(lambda: native.row_cut(weight, norm, None, halves, quota, False, mask)),
        "cut to a mask": Counted(lambda: native.cut(weight, norm, None, half, quota, False, mask)),
        "block_scores 16 x 16": Counted(lambda: native.block_scores(weight, norm, None, 16, 16)),
        "masked_take of half": Counted(lambda: native.masked_take(weight, half_of_them), passes=2),
        "masked_put of half": Counted(lambda: native.masked_put(weight.clone(), half_of_them, values), passes=2),
        "fingerprint": Counted(lambda: native.fingerprint(bits)),
    }
    if dtype == torch.float32:
        x, g = (torch.randn(SAMPLES, TOKENS, FEATURES, generator=draw) for _ in range(2))
        rows, head = x[0], torch.randn(VOCABULARY, FEATURES, generator=draw)
        logits = rows, head, torch.zeros(TOKENS, dtype=torch.int64), None
        elements = rows.numel() + head.numel()
        listed = torch.randint(1 << 30, (2, 32 * ROWS), generator=draw, dtype=torch.int32)
        counts, need = torch.full((2, ROWS), 32), torch.full((ROWS,), 32)
        found |= {
            "row_merge of 2 times 32 keys": Counted(lambda: native.row_merge(listed, counts, need, 0), listed.numel()),
            f"lower_gram of {TOKENS} tokens": Counted(lambda: native.lower_gram(x), x.numel()),
            f"ghost norms of {TOKENS} tokens": Counted(lambda: native.ghost(x, g), x.numel() + g.numel()),
            f"direct norms of {TOKENS} tokens": Counted(lambda: native.direct(x, g), x.numel() + g.numel()),
            f"direct norms and gradient of {TOKENS} tokens": Counted(
                lambda: native.direct_with_gradient(x, g), x.numel() + g.numel()
            ),
            f"logprobs of {TOKENS} tokens": Counted(lambda: native.softmax_parts(*logits), elements),
            f"logit_gradients of {TOKENS} tokens": Counted(
                lambda: native.logit_gradients(*logits, torch.zeros(TOKENS), torch.ones(TOKENS)), elements
            ),
        }
    return found


def why_not() -> str | None:
    """Why instructions cannot be counted here; None if they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    return None if native.available() else native.reason()


def count() -> dict[str, dict[str, float]]:
    """Op -> dtype -> instructions an element of its input. Takes two minutes or three.

    Raises:
        HftcoreError: no valgrind, no native library, or the count fails.
    """
    reason = why_not()
    if reason:
        raise HftcoreError(f"instructions cannot be counted: {reason}")
    wanted = [(op, dtype, one) for dtype in DTYPES for op, one in calls(dtype).items()]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counted"
        entry = ENTRY.format(_code())
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no"]
        command += [f"--toggle-collect={entry}", f"--dump-after={entry}", sys.executable, "-P", "-m", __spec__.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # the last dump is that of the end, when nothing more is counted
        parts = [_total(Path(f"{out}.{number}")) for number in range(1, 2 + sum(one.passes for *_, one in wanted))]
    totals = [part for part in parts if part]
    if done.returncode or len(totals) != sum(one.passes for *_, one in wanted):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise HftcoreError(f"valgrind counted {len(totals)} calls of {sum(one.passes for *_, one in wanted)}: {said}")
    counts: dict[str, dict[str, float]] = {}
    for op, dtype, one in wanted:
        spent, totals = sum(totals[: one.passes]), totals[one.passes :]
        counts.setdefault(op, {})[str(dtype).removeprefix("torch.")] = spent / one.elements
    return counts


def measured() -> list[Measurement]:
    """The counts as lines of a result file, or one line that says why there are none.

    Raises:
        HftcoreError: the count fails.
    """
    reason = why_not()
    if reason:
        return [_line("", "", TOOL, "missing", reason=reason)]
    return [
        _line(op, dtype, f"{TOOL} of the {_code()} code", "counted", instructions=round(spent, 3))
        for op, of in count().items()
        for dtype, spent in of.items()
    ]


def _code() -> str:
    return "avx2" if "avx2" in native.simds() else "portable"


def _total(part: Path) -> int:
    found = re.search(r"^totals: (\d+)", part.read_text(), re.MULTILINE) if part.exists() else None
    return int(found[1]) if found else 0


def _line(
    op: str, dtype: str, variant: str, kind: str, instructions: float | None = None, reason: str | None = None
) -> Measurement:
    return Measurement(
        case=CASE,
        shape=op,
        size=[],
        dtype=dtype,
        device="cpu",
        backend="native",
        threads=1,
        variant=variant,
        kind=kind,
        times_ms=[],
        median_ms=None,
        p20_ms=None,
        p80_ms=None,
        bytes_moved=None,
        products=None,
        extra_bytes=None,
        canary=1.0,
        neighbours=None,
        noisy=False,
        reason=reason,
        instructions=instructions,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for one in calls(dtype).values():
            one.call()
