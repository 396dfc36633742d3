"""Cost against one size at a time: rows, columns, tokens, samples, layers, sparsity, threads, ranks of LoRA and of processes."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import hftcore
from hftcore import ops
from hftcore.bench.ceiling import ceilings
from hftcore.bench.job import Job
from hftcore.bench.models import model_of, tokens_of
from hftcore.bench.samples import logprobs_job, norms_job
from hftcore.bench.selection import energy_job, matrix, prune_job
from hftcore.bench.timing import Canary, Clock
from hftcore.pattern import Pattern

BETTER = 8.0  # how many times smaller the squared error of two lines must be
APART = 0.25  # how far the two slopes must lie apart
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """What is measured at several values of one size, and the name of that size."""

    about: str
    axis: str


@dataclass(frozen=True)
class Sweep(Curve):
    """A curve of calls in this process.

    Fields:
        values: from small to large.
        job: value, dtype, device -> the call; only `ours` is timed.
    """

    values: tuple[float, ...]
    job: Callable[[float, torch.dtype, torch.device], Job]


def _doubling(first: int, last: int) -> tuple[float, ...]:
    return tuple(float(first << power) for power in range(int(math.log2(last / first)) + 1))


_rows = prune_job(Pattern("50%"), lambda matrix: matrix, {})
_matrix = prune_job(Pattern("50%", scope="matrix"), lambda matrix: matrix.reshape(1, -1), {})


def _sparse(value: float, dtype: torch.dtype, device: torch.device) -> Job:
    return prune_job(Pattern(f"{value:g}%"), lambda matrix: matrix, {})("1024x4096", dtype, device)


def _threaded(value: float, dtype: torch.dtype, device: torch.device) -> Job:
    original, energy = matrix("2048x4096", dtype, device)
    weight = original.clone()
    pattern = Pattern("50%")

    def ours() -> torch.Tensor:
        with _threads(int(value)):
            return ops.prune_(weight, energy, pattern)

    def restore() -> None:
        # with as many, for what changes their number starts or ends threads
        with _threads(int(value)):
            weight.copy_(original)

    return Job(ours, {}, restore, torch.equal, ceilings=ceilings(weight, original))


def _layered(value: float, dtype: torch.dtype, device: torch.device) -> Job:
    model = model_of("small-llama", dtype, device, layers=int(value))
    batches = [{"input_ids": tokens_of(model, 2, 128, device)}]
    return Job(lambda: hftcore.calibrate(model, batches), {}, lambda: None, torch.equal)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


SWEEPS: dict[str, Sweep] = {
    "prune_rows by columns": Sweep(
        "prune_rows [256, N]",
        "columns N",
        _doubling(64, 65536),
        lambda value, dtype, device: _rows(f"256x{value:.0f}", dtype, device),
    ),
    "prune_rows by rows": Sweep(
        "prune_rows [M, 4096]",
        "rows M",
        _doubling(8, 8192),
        lambda value, dtype, device: _rows(f"{value:.0f}x4096", dtype, device),
    ),
    "prune_matrix by rows": Sweep(
        "prune_matrix [M, 4096]",
        "rows M",
        _doubling(8, 8192),
        lambda value, dtype, device: _matrix(f"{value:.0f}x4096", dtype, device),
    ),
    "prune_rows by sparsity": Sweep(
        "prune_rows [1024, 4096]", "sparsity in %", (1, 2, 5, 10, 20, 35, 50, 65, 80, 90, 95, 98, 99), _sparse
    ),
    "prune_rows by threads": Sweep(
        "prune_rows [2048, 4096]", "threads", tuple(float(n) for n in range(1, torch.get_num_threads() + 1)), _threaded
    ),
    "column_energy by tokens": Sweep(
        "column_energy [T, 2048]",
        "tokens T",
        _doubling(16, 16384),
        lambda value, dtype, device: energy_job(f"{value:.0f}x2048", dtype, device),
    ),
    "grad_norms_sq by tokens": Sweep(
        "grad_norms_sq [2, T, 512] [2, T, 512]",
        "tokens T",
        _doubling(16, 4096),
        lambda value, dtype, device: norms_job(f"2x{value:.0f}x512x512", dtype, device),
    ),
    "grad_norms_sq by samples": Sweep(
        "grad_norms_sq [B, 128, 512] [B, 128, 512]",
        "samples B",
        _doubling(1, 64),
        lambda value, dtype, device: norms_job(f"{value:.0f}x128x512x512", dtype, device),
    ),
    "grad_norms_sq by LoRA rank": Sweep(
        "grad_norms_sq [8, 128, 2048] [8, 128, r]",
        "rank r",
        _doubling(1, 256),
        lambda value, dtype, device: norms_job(f"8x128x2048x{value:.0f}", dtype, device),
    ),
    "calibrate by layers": Sweep("calibrate, 2 x 128 tokens, width 512", "layers", _doubling(1, 16), _layered),
    "sequence_logprobs by tokens": Sweep(
        "sequence_logprobs [2, T, 256], V 8192",
        "tokens T",
        _doubling(16, 1024),
        lambda value, dtype, device: logprobs_job(f"2x{value:.0f}x256x8192", dtype, device),
    ),
}

# of several processes, as `hftcore-bench ranks` measures them
SIDE = 4096  # rows and columns of each matrix that is selected on
SIZES = (1, 4, 16, 64)  # so many of them: 17 million to 1.07 billion weights
BY_COLUMNS = "0.5 row by columns"
PATTERNS = ("0.5 row", BY_COLUMNS, "0.5 model")  # by columns: rows that no process holds whole
CALIBRATED = "calibrate by ranks"
ONE, ALONE = "one process", "each process by itself"  # what several together are compared with


def selected(pattern: str, matrices: int) -> str:
    """The name of a curve of exact selection."""
    return f"sharded_masks {pattern}, {matrices * SIDE**2 / 1e6:.0f} M weights, by ranks"


RANKED = {
    CALIBRATED: Curve("calibrate, 16 x 128 tokens", "processes of a thread"),
    **{
        selected(pattern, matrices): Curve(f"sharded {pattern}, {matrices} x [{SIDE}, {SIDE}]", "processes")
        for pattern in PATTERNS
        for matrices in SIZES
    },
}


def curves() -> dict[str, Curve]:
    """Every curve by its name in result files."""
    return {**SWEEPS, **RANKED}


def sweep_times(
    sweep: Sweep, dtype: torch.dtype, device: torch.device, rounds: int, budget_s: float, canary: Canary
) -> dict[float, list[float]]:
    """Milliseconds by value; every round visits all values, so that a slow moment of the machine does not bend the curve.

    Args:
        budget_s: rounds end once so many seconds were timed, after one at least.
        canary: sings once a round.
    """
    clock = Clock(device)
    jobs = {value: sweep.job(value, dtype, device) for value in sweep.values}
    times: dict[float, list[float]] = {value: [] for value in jobs}
    for job in jobs.values():
        job.ours()
    for turn in range(rounds):
        canary.sing()
        for value in list(jobs) if turn % 2 == 0 else reversed(list(jobs)):
            jobs[value].restore()
            times[value].append(clock.time(jobs[value].ours))
        if sum(map(sum, times.values())) > 1000 * budget_s:
            break
    return times


def exponent(points: Points) -> float:
    """The slope of the straight line that fits the logarithms best.

    >>> round(exponent([(1, 3.0), (2, 12.0), (4, 48.0)]), 3)
    2.0
    """
    return _line(points)[0]


@dataclass(frozen=True)
class Bend:
    """Where a curve changes: the exponents before and after the value `at`."""

    at: float
    before: float
    after: float


def bend(points: Points) -> Bend | None:
    """Where two lines, of three points at least each, fit the logarithms far better than one; None where they do not.

    >>> bend([(n, max(64.0, n)) for n in (8, 16, 32, 64, 128, 256, 512)])
    Bend(at=64, before=0.0, after=1.0)
    >>> bend([(n, 2.0 * n) for n in (8, 16, 32, 64, 128, 256, 512)])
    """
    _, whole = _line(points)
    best: tuple[float, Bend] | None = None
    for cut in range(2, len(points) - 2):
        # the point at the change belongs to both lines
        (before, left), (after, right) = _line(points[: cut + 1]), _line(points[cut:])
        if best is None or left + right < best[0]:
            best = (left + right, Bend(points[cut][0], round(before, 6), round(after, 6)))
    if best is None or whole < 1e-9 or best[0] * BETTER > whole or abs(best[1].after - best[1].before) < APART:
        return None
    return best[1]


def _line(points: Points) -> tuple[float, float]:
    """Slope of the least-squares line through the logarithms, and the sum of its squared errors."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    slope, start = statistics.linear_regression(xs, ys)
    return slope, sum((start + slope * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
