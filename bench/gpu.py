"""Everything worth doing on a GPU machine, in one call of under nine minutes; and its rehearsal without one."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from hftcore.backend import use_backend
from hftcore.bench import results
from hftcore.bench.cases import CASES
from hftcore.bench.measure import Effort, chosen, run
from hftcore.errors import HftcoreError

MINUTES = 8.5
TEST_SECONDS = 180
TESTS = Path(__file__).resolve().parent.parent / "tests"


def require_gpu() -> None:
    """Refuse a machine without a GPU.

    Raises:
        HftcoreError: in one line, with what to do instead.
    """
    if not torch.cuda.is_available():
        raise HftcoreError(
            "hftcore-bench gpu needs a CUDA or ROCm device and torch finds none; use `hftcore-bench run` for the CPU, "
            "or `hftcore-bench gpu --rehearse`"
        )


def session(out: Path | None, rehearse: bool, say: Callable[[str], None]) -> tuple[Path, bool]:
    """Run the GPU-marked tests where the checkout has them, then every case, and write a result file.

    Args:
        out: the result file; None: bench/results/<device>.jsonl under the working directory.
        rehearse: take the same way on CPU tensors of tiny shapes in Triton's interpreter; tests are only collected.
        say: takes one line for people.

    Returns:
        (the result file, whether every test and every case went well).

    Raises:
        HftcoreError: no GPU.
    """
    begin = time.monotonic()
    if rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise HftcoreError("a rehearsal needs the environment variable TRITON_INTERPRET=1 from the start")
        device = torch.device("cpu")
    else:
        require_gpu()
        device = torch.device("cuda")
    passed = _tests(rehearse, say)
    facts = results.run_facts(device)
    if out is None:
        stem = f"rehearsal-{results.file_stem(facts)}" if rehearse else results.file_stem(facts)
        out = Path("bench/results") / f"{stem}.jsonl"
    wanted = [one for one in chosen() if not rehearse or one[1] == CASES[one[0]].shapes[0]]
    effort = Effort(is_rehearsal=True) if rehearse else Effort(rounds=15, budget_s=1.0)
    # without a GPU the triton backend must be asked for; with one it is what the device gets
    with use_backend("triton") if rehearse else nullcontext():
        complete = run(
            wanted,
            device,
            effort,
            lambda measured: results.append(out, measured, facts),
            say,
            deadline=begin + MINUTES * 60 - 30,
        )
    say(f"{time.monotonic() - begin:.0f} s in all")
    return out, passed and complete


def _tests(rehearse: bool, say: Callable[[str], None]) -> bool:
    if not TESTS.is_dir() or importlib.util.find_spec("pytest") is None:
        say("tests: left out, " + ("pytest is not installed" if TESTS.is_dir() else "this installation has no tests/"))
        return True
    command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(TESTS)]
    if rehearse:
        command.append("--collect-only")
    try:
        done = subprocess.run(
            command, cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        say(f"tests: stopped after {TEST_SECONDS} s")
        return False
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    for line in lines if done.returncode == 1 else lines[-1:]:
        say(f"tests: {line}")
    return done.returncode in (0, 5)  # 5: there are none
