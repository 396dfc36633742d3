"""Everything worth doing on a GPU machine, in one call of under nine minutes; and its rehearsal without one."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hftcore.backend import use_backend
from hftcore.bench import results, scaling, tuning
from hftcore.bench.cases import CASES
from hftcore.bench.job import FLOATS
from hftcore.bench.measure import Effort, chosen, run, sweep
from hftcore.bench.models import LARGE
from hftcore.bench.scoreboard import run_until
from hftcore.bindings import embedded
from hftcore.errors import HftcoreError

MINUTES = 8.5
TEST_SECONDS = 150
TESTS = Path(__file__).resolve().parent.parent / "tests"
# what is most worth knowing comes first: a session that runs out of time loses the end
FIRST = (
    ("prune_rows", "1gb"),
    ("prune_rows", "llama-7b.up_proj"),
    ("prune_matrix", "1gb"),
    ("column_energy", "tokens-mlp"),
    ("grad_norms_sq", "samples-7b T2048"),
    ("prune_2_4", "llama-7b.up_proj"),
    ("prune_mask", "llama-7b.up_proj"),
    ("sequence_logprobs", "llama-3-8b.head"),
    ("calibrate bf16", "llama-3-8b"),
    ("antidote bf16", "llama-3-8b"),
)
# whole models take minutes in the interpreter, and what these launch others launch too
REPEATED = (
    "calibrate bf16",
    *(f"wanda{way}{dtype}" for way in ("", " block by block", " model scope") for dtype in ("", " bf16")),
)
Say = Callable[[str], None]


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


def session(out: Path | None, rehearse: bool, tune: bool, say: Say, minutes: float = MINUTES) -> tuple[Path, bool]:
    """Run the GPU-marked tests where the checkout has them, then every case, then scaling, and write a result file as they come.

    Args:
        out: the result file; None: bench/results/<device>.jsonl under the working directory.
        rehearse: take the same way on CPU tensors of tiny shapes in Triton's interpreter; tests are only collected.
        tune: after the first cases, time other launch numbers and say which are faster.
        say: takes one line for people.
        minutes: nothing is started after so many, less the half that a case may take.

    Returns:
        (the result file, whether every test and every case that was reached went well).

    Raises:
        HftcoreError: no GPU.
        ValueError: `out` holds results of another machine.
    """
    begin = time.monotonic()
    if rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise HftcoreError("a rehearsal needs the environment variable TRITON_INTERPRET=1 from the start")
        device = torch.device("cpu")
    else:
        require_gpu()
        device = torch.device("cuda")
    deadline = begin + minutes * 60 - 30
    facts = results.run_facts(device)
    if out is None:
        stem = f"rehearsal-{results.file_stem(facts)}" if rehearse else results.file_stem(facts)
        out = Path("bench/results") / f"{stem}.jsonl"
    results.require_same_machine(out, facts)
    passed = _tests(rehearse, say)
    effort = Effort(is_rehearsal=True) if rehearse else Effort(rounds=15, budget_s=0.7)

    def keep(measured: list[results.Measurement]) -> None:
        results.append(out, measured, facts)

    first, rest = ordered(rehearse)
    # without a GPU the triton backend must be asked for; with one it is what the device gets
    with use_backend("triton") if rehearse else nullcontext():
        complete = run(first, device, effort, keep, say, deadline)
        if tune:
            complete &= _tolerated("tune", lambda: _tuned(device, effort, deadline, say), say)
        complete &= run(rest, device, effort, keep, say, deadline)
        for name in [one for one in scaling.SWEEPS if not one.endswith("by threads")][: 1 if rehearse else None]:
            if time.monotonic() > deadline:
                say(f"{name}: left out, the time is up")
                continue
            complete &= _tolerated(name, partial(_swept, name, device, effort, keep), say)
    if not rehearse:
        complete &= _scoreboard(out.with_suffix(".scoreboard"), deadline, say)
    say(f"{time.monotonic() - begin:.0f} s in all")
    return out, passed and complete


def _tuned(device: torch.device, effort: Effort, deadline: float, say: Say) -> None:
    for line in tuning.propose(device, effort, deadline):
        say(line)


def _swept(name: str, device: torch.device, effort: Effort, keep: Callable[[list[results.Measurement]], None]) -> None:
    keep(sweep(name, torch.bfloat16, device, effort))


def _scoreboard(folder: Path, deadline: float, say: Say) -> bool:
    """As much of the scoreboard as the time that is left allows."""
    missing = [f"{name} is not installed" for name in ("peft", "matplotlib") if importlib.util.find_spec(name) is None]
    missing += [] if embedded.is_available() else ["the embedded model is not here"]
    if missing or time.monotonic() > deadline:
        say(f"scoreboard: left out, {missing[0] if missing else 'the time is up'}")
        return True
    return _tolerated("scoreboard", lambda: say(f"scoreboard: {run_until(deadline, folder)} cells"), say)


def _tolerated(name: str, part: Callable[[], None], say: Say) -> bool:
    """Whether a part went well; what fails, of a compiler or driver, does not cost the session the rest."""
    try:
        part()
    except Exception as error:
        say(f"{name}: failed, {type(error).__name__}: {error}")
        return False
    say(f"{name}: done")
    return True


def ordered(rehearse: bool) -> tuple[list[Any], list[Any]]:
    """What to measure: (the most important, the rest); in a rehearsal the first shape of every case that takes a way of its own.

    On a GPU, bfloat16 comes before float32, and models too small for one are left out.
    """
    every = chosen()
    if rehearse:
        return [], [one for one in every if one[1] == CASES[one[0]].shapes[0] and one[0] not in REPEATED]
    wanted = [one for one in every if _is_for_gpus(*one)]
    first = [one for where in FIRST for one in wanted if one[:2] == where and one[2] == torch.bfloat16]
    rest = [one for one in wanted if one not in first]
    return first, sorted(rest, key=lambda one: FLOATS.index(one[2]) == 0)


def _is_for_gpus(name: str, shape: str, dtype: torch.dtype) -> bool:
    tiny = shape == CASES[name].shapes[0] and not name.startswith("dispatch")
    return not tiny and (not name.startswith(("calibrate", "antidote", "wanda")) or shape in LARGE)


def _tests(rehearse: bool, say: Say) -> bool:
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
