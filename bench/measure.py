"""Run one case: compare the answers, then memory, then interleaved times."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hftcore.backend import backend_for
from hftcore.bench.cases import CASES
from hftcore.bench.job import QUICK, Job, UnavailableError, shape_of
from hftcore.bench.memory import extra_bytes
from hftcore.bench.results import Measurement
from hftcore.bench.timing import Canary, Clock, Neighbours, interleave, is_noisy, summary
from hftcore.errors import HftcoreError

OURS = "hftcore"


class DisagreementError(Exception):
    """A peer's answer is not ours, so there is nothing to time."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, and seconds of its calls after which a variant sits out; a rehearsal does as little as it can."""

    rounds: int = 9
    budget_s: float = 4.0
    is_rehearsal: bool = False


def chosen(
    names: list[str] | None = None, shapes: list[str] | None = None, quick: bool = False
) -> list[tuple[str, str, torch.dtype]]:
    """(case, shape, dtype) to run, in order.

    Args:
        names, shapes: only these; None or empty: all.
        quick: only small shapes.

    Raises:
        HftcoreError: a name that is no case, or no shape.
    """
    known = list(dict.fromkeys(shape for case in CASES.values() for shape in case.shapes))
    for option, wanted, allowed in (("--case", names, list(CASES)), ("--shape", shapes, known)):
        for name in wanted or ():
            if name not in allowed:
                raise HftcoreError(f"{option} must be one of {', '.join(allowed)}, got {name!r}")
    return [
        (name, shape, dtype)
        for name, case in CASES.items()
        if not names or name in names
        for shape in case.shapes
        if (not shapes or shape in shapes) and (not quick or shape in QUICK)
        for dtype in case.dtypes
    ]


def _call_into(returned: list[Any], call: Callable[[], Any]) -> None:
    returned.append(call())


def compare(job: Job, device: torch.device) -> dict[str, int | None]:
    """Extra memory of our call and of each peer's, after our answer was checked and every peer gave the same.

    Raises:
        DisagreementError: names the peer.
    """
    extra = {}
    answers = []
    for name, call in {OURS: job.ours, **job.peers}.items():
        job.restore()
        returned: list[Any] = []
        extra[name] = extra_bytes(partial(_call_into, returned, call), device)
        answers.append(job.answer(returned.pop()))
        if name == OURS:
            try:
                job.check(answers[0])
            except ValueError as error:
                raise DisagreementError(str(error)) from error
        elif not job.agrees(answers[0], answers.pop()):
            raise DisagreementError(f"the answer of {name} differs from ours")
    job.restore()
    return extra


def measure(name: str, shape: str, dtype: torch.dtype, device: torch.device, effort: Effort) -> list[Measurement]:
    """All variants of one case, ours first.

    Raises:
        UnavailableError: the case cannot run here.
        DisagreementError: an answer is wrong; nothing was timed.
    """
    case = CASES[name]
    job = case.prepare(shape, dtype, device)
    if not job.is_long:
        job.ours()
    gc.collect()
    extra = compare(job, device)
    kinds = {OURS: "ours"} | dict.fromkeys(job.peers, "peer") | dict.fromkeys(job.ceilings, "ceiling")
    variants: dict[str, Callable[[], Any]] = {OURS: job.ours, **job.peers, **job.ceilings}
    for call in job.ceilings.values() if not job.is_long else ():
        call()
    clock = Clock(device)
    canary, neighbours = Canary(clock), Neighbours()
    rounds, inner = (1, 1) if effort.is_rehearsal else (job.rounds or effort.rounds, job.inner)
    times = interleave(variants, clock, job.restore, rounds, effort.budget_s, inner, canary)
    job.restore()
    slowdown, others = canary.slowdown(), neighbours.cores()
    rows, columns = shape_of(shape, dtype)
    measurements = []
    for variant, kind in kinds.items():
        spread = summary(times[variant])
        measurements.append(
            Measurement(
                case=name,
                shape=shape,
                rows=rows,
                columns=columns,
                dtype=str(dtype).removeprefix("torch."),
                device=device.type,
                backend=backend_for(device.type),
                threads=torch.get_num_threads(),
                variant=variant,
                kind=kind,
                times_ms=[float(f"{one:.5g}") for one in times[variant]],
                median_ms=float(f"{spread.median:.5g}"),
                p20_ms=float(f"{spread.p20:.5g}"),
                p80_ms=float(f"{spread.p80:.5g}"),
                bytes_moved=case.bytes_moved(rows, columns, dtype.itemsize) if case.bytes_moved else None,
                extra_bytes=extra.get(variant),
                canary=round(slowdown, 3),
                neighbours=None if others is None else round(others, 2),
                noisy=is_noisy(slowdown, others),
            )
        )
    return measurements


def run(
    wanted: list[tuple[str, str, torch.dtype]],
    device: torch.device,
    effort: Effort,
    keep: Callable[[list[Measurement]], None],
    say: Callable[[str], None],
    deadline: float | None = None,
) -> bool:
    """Measure one after the other; a case that cannot run or is wrong does not stop the others.

    Args:
        keep: takes the measurements of a case as soon as they are there.
        say: takes one line for people.
        deadline: of time.monotonic(); nothing is started after it.

    Returns:
        True if everything wanted was measured, or could not run here for a stated reason.
    """
    complete = True
    for name, shape, dtype in wanted:
        label = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
        if deadline is not None and time.monotonic() > deadline:
            say(f"{label}: left out, the time is up")
            complete = False
            continue
        try:
            measurements = measure(name, shape, dtype, device, effort)
        except UnavailableError as reason:
            say(f"{label}: left out, {reason}")
            continue
        except Exception as error:  # a compiler's, a driver's: whatever it is, the other cases still run
            say(f"{label}: failed, {type(error).__name__}: {error}")
            complete = False
            continue
        keep(measurements)
        listed = ", ".join(f"{one.variant} {one.median_ms:.4g} ms" for one in measurements)
        say(f"{label}: {listed}{' (noisy)' if measurements[0].noisy else ''}")
    return complete
