"""Run one case: compare the answers, then memory, then interleaved times."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hftcore.backend import backend_for
from hftcore.bench import scaling
from hftcore.bench.cases import CASES
from hftcore.bench.graphs import kernels_alone
from hftcore.bench.job import QUICK, Job, UnavailableError, shape_of
from hftcore.bench.memory import HELD, RETURNED, USUAL, extra_bytes, freed_memory
from hftcore.bench.results import RUN, Measurement
from hftcore.bench.timing import Canary, Clock, Neighbours, interleave, is_noisy, summary
from hftcore.bench.worker import Remote, WorkerError
from hftcore.errors import HftcoreError

OURS = "hftcore"
ALONE = "hftcore's kernels alone"


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
        HftcoreError: a name that is no case, or no shape; nothing is left of what was asked for.
    """
    known = list(dict.fromkeys(shape for case in CASES.values() for shape in case.shapes))
    for option, wanted, allowed in (("--case", names, list(CASES)), ("--shape", shapes, known)):
        for name in wanted or ():
            if name not in allowed:
                raise HftcoreError(f"{option} must be one of {', '.join(allowed)}, got {name!r}")
    found = [
        (name, shape, dtype)
        for name, case in CASES.items()
        if not names or name in names
        for shape in case.shapes
        if (not shapes or shape in shapes) and (not quick or shape in QUICK)
        for dtype in case.dtypes
    ]
    if not found:
        of = "; ".join(f"{name}: {', '.join(CASES[name].shapes)}" for name in names or ())
        small = f"--quick runs only {', '.join(one for one in known if one in QUICK)}" if quick else ""
        raise HftcoreError(f"no chosen case has a chosen shape; {'; '.join(part for part in (of, small) if part)}")
    return found


def _call_into(returned: list[Any], call: Callable[[], Any]) -> None:
    returned.append(call())


def compare(job: Job, device: torch.device) -> dict[str, int | None]:
    """Extra memory of our call and of each peer's, after our answer was checked and every peer gave the same.

    A peer of another process that fails or answers otherwise, and a compiled one that answers otherwise, is moved to `job.missing` with
    what happened: a package's own doing.

    Raises:
        DisagreementError: our answer, or that of a peer written for this suite, is wrong.
    """
    extra = {}
    answers = []
    for name, call in {OURS: job.ours, **job.peers}.items():
        job.restore()
        returned: list[Any] = []
        try:
            # another process tells its answer and its memory apart
            extra[name] = extra_bytes(partial(_call_into, returned, call), device)
            if isinstance(call, Remote):
                extra[name] = call.extra_bytes()
        except WorkerError as error:
            job.missing[name] = str(error)
            del job.peers[name]
            continue
        answers.append(returned.pop() if isinstance(call, Remote) else job.answer(returned.pop()))
        if name == OURS:
            try:
                job.check(answers[0])
            except ValueError as error:
                raise DisagreementError(str(error)) from error
        elif not job.agrees(answers[0], theirs := answers.pop()):
            if not isinstance(call, Remote) and name not in job.compiled:
                raise DisagreementError(f"the answer of {name} differs from ours")
            job.missing[name] = f"another answer: {difference(answers[0], theirs)}"
            del job.peers[name]
    job.restore()
    return extra


def difference(ours: Any, theirs: Any) -> str:
    """In words, how far two answers lie apart.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    '50 % of the values, by up to 1'
    >>> difference({"a": torch.tensor([0.0, 2.0])}, {"a": torch.tensor([1.0, 2.0])})
    '50 % of the values of a'
    """
    if isinstance(ours, dict):
        parts = {name: float((ours[name] != theirs[name]).float().mean()) for name in ours if name in theirs}
        worst = max(parts, key=parts.__getitem__, default="nothing that both have")
        return f"{100 * parts.get(worst, 1.0):.3g} % of the values of {worst}"
    if ours.shape != theirs.shape:
        return f"shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
    differ = ours != theirs
    furthest = (ours.double() - theirs.double())[differ].abs().max()
    return f"{100 * float(differ.double().mean()):.3g} % of the values, by up to {float(furthest):.3g}"


def measure(name: str, shape: str, dtype: torch.dtype, device: torch.device, effort: Effort) -> list[Measurement]:
    """All variants of one case, ours first, and the peers that are missing.

    Raises:
        UnavailableError: the case cannot run here.
        DisagreementError: an answer is wrong; nothing was timed.
    """
    # from the beginning: what is in the heap already is used again, and returned by nobody
    with freed_memory(RETURNED):
        job = CASES[name].prepare(shape, dtype, device)
        try:
            return _measured(job, name, shape, dtype, device, effort)
        finally:
            job.close()


def _measured(
    job: Job, name: str, shape: str, dtype: torch.dtype, device: torch.device, effort: Effort
) -> list[Measurement]:
    if not job.is_long and not effort.is_rehearsal:
        job.ours()
    gc.collect()
    extra = compare(job, device)
    kinds = {OURS: "ours"} | dict.fromkeys(job.peers, "peer") | dict.fromkeys(job.ceilings, "ceiling")
    variants: dict[str, Callable[[], Any]] = {OURS: job.ours, **job.peers, **job.ceilings}
    for variant, call in job.ceilings.items():
        job.restore()
        extra[variant] = extra_bytes(call, device)
    if device.type == "cuda" and not job.is_long:
        job.restore()
        alone = kernels_alone(job.ours)
        if alone is not None:
            variants[ALONE], kinds[ALONE] = alone, "kernels"
    clock = Clock(device)
    canary, neighbours = Canary(clock), Neighbours()
    rounds, inner = (1, 1) if effort.is_rehearsal else (job.rounds or effort.rounds, job.inner)
    # of the two that matter most in few long rounds, none is left out
    always = (OURS, *job.ceilings) if job.rounds else ()
    with freed_memory(HELD if job.holds_memory else USUAL):
        for call in (job.ours, *job.ceilings.values()) if job.holds_memory and not effort.is_rehearsal else ():
            job.restore()
            call()  # memory that is kept is taken once
        times = interleave(variants, clock, job.restore, rounds, effort.budget_s, inner, canary, always)
    job.restore()
    size = shape_of(shape, dtype)
    work = CASES[name].work
    ideal = work(size, dtype.itemsize) if work else None
    common = _common(name, shape, list(size), dtype, device, canary, neighbours) | {
        "bytes_moved": ideal.bytes if ideal else None,
        "products": ideal.products if ideal else None,
    }
    return [
        *(timed(common, variant, kind, times[variant], extra.get(variant)) for variant, kind in kinds.items()),
        *(missing(common, variant, reason) for variant, reason in job.missing.items()),
    ]


def _common(
    name: str,
    shape: str,
    size: list[int],
    dtype: torch.dtype,
    device: torch.device,
    canary: Canary,
    neighbours: Neighbours,
) -> dict[str, Any]:
    slowdown, others = canary.slowdown(), neighbours.cores()
    return {
        "case": name,
        "shape": shape,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "backend": backend_for(device.type),
        "threads": torch.get_num_threads(),
        "canary": round(slowdown, 3),
        "neighbours": None if others is None else round(others, 2),
        "noisy": is_noisy(slowdown, others),
    }


def sweep(name: str, dtype: torch.dtype, device: torch.device, effort: Effort) -> list[Measurement]:
    """The points of one scaling curve; a point's shape is its value. A rehearsal visits three."""
    clock = Clock(device)
    canary, neighbours = Canary(clock), Neighbours()
    rounds = 1 if effort.is_rehearsal else effort.rounds
    curve = scaling.SWEEPS[name]
    if effort.is_rehearsal:
        curve = replace(curve, values=curve.values[:3])
    points = scaling.sweep_times(curve, dtype, device, rounds, effort.budget_s, canary)
    nothing = {"bytes_moved": None, "products": None}
    return [
        timed(_common(name, f"{value:g}", [], dtype, device, canary, neighbours) | nothing, OURS, "ours", times, None)
        for value, times in points.items()
    ]


def timed(common: dict[str, Any], variant: str, kind: str, times: list[float], extra: int | None) -> Measurement:
    """One variant's line."""
    spread = summary(times)
    return Measurement(
        **common,
        variant=variant,
        kind=kind,
        times_ms=[_short(one) for one in times],
        median_ms=_short(spread.median),
        p20_ms=_short(spread.p20),
        p80_ms=_short(spread.p80),
        extra_bytes=extra,
    )


def missing(common: dict[str, Any], variant: str, reason: str) -> Measurement:
    """The line of a peer that could not run."""
    nothing: dict[str, Any] = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "extra_bytes"))
    return Measurement(**common, **nothing, variant=variant, kind="missing", times_ms=[], reason=reason)


def duration(shape: str, seconds: float, device: torch.device, neighbours: Neighbours) -> Measurement:
    """The line of a whole run that took so long; witnessed by the neighbours alone."""
    others = neighbours.cores()
    common = {
        "case": RUN,
        "shape": shape,
        "size": [],
        "dtype": "",
        "device": device.type,
        "backend": backend_for(device.type),
        "threads": torch.get_num_threads(),
        "bytes_moved": None,
        "products": None,
        "canary": 1.0,
        "neighbours": None if others is None else round(others, 2),
        "noisy": is_noisy(1.0, others),
    }
    return timed(common, OURS, "ours", [1e3 * seconds], None)


def _short(time: float) -> float:
    return float(f"{time:.5g}")


def run(
    wanted: list[tuple[str, str, torch.dtype]],
    device: torch.device,
    effort: Effort,
    keep: Callable[[list[Measurement]], None],
    say: Callable[[str], None],
    deadline: float | None = None,
    how: Callable[..., list[Measurement]] | None = None,
) -> bool:
    """Measure one after the other; a case that cannot run or is wrong does not stop the others.

    Args:
        keep: takes the measurements of a case as soon as they are there.
        say: takes one line for people.
        deadline: of time.monotonic(); nothing is started after it.
        how: in place of `measure`.

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
            measurements = (how or measure)(name, shape, dtype, device, effort)
        except UnavailableError as reason:
            say(f"{label}: left out, {reason}")
            continue
        except Exception as error:  # a compiler's, a driver's: whatever it is, the other cases still run
            say(f"{label}: failed, {type(error).__name__}: {error}")
            complete = False
            continue
        keep(measurements)
        listed = ", ".join(f"{one.variant} {one.median_ms:.4g} ms" for one in measurements if one.median_ms is not None)
        say(f"{label}: {listed}{' (noisy)' if measurements[0].noisy else ''}")
    return complete
