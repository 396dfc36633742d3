"""Other launch numbers than those of `kernels/launch.py`, timed: which the table should have on this GPU."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hftcore import ops
from hftcore.bench.measure import Effort
from hftcore.bench.selection import matrix
from hftcore.bench.timing import Clock, interleave
from hftcore.kernels import launch
from hftcore.pattern import Pattern

WARPS = (1, 2, 4, 8, 16)
GAIN = 0.97  # a proposal must take at most this share of the time


@dataclass(frozen=True)
class Question:
    """One entry of the launch table.

    Fields:
        function: of `launch`, that chooses it.
        shape: what it is asked for; tiny: in a rehearsal.
        call: (weight, energy) -> result to compare.
        others: the present choice -> choices to try.
    """

    function: str
    shape: str
    tiny: str
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    others: Callable[[tuple[int, ...]], Iterator[tuple[int, ...]]]


def _rows(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    m, n, _ = tile
    yield from (launch.Tile(rows, n, warps) for rows in {max(1, m // 2), m, 2 * m} for warps in WARPS)


def _tiles(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    m, n, _ = tile
    yield from (launch.Tile(m, columns, warps) for columns in (n // 2, n, 2 * n) for warps in WARPS)


def _energies(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    t, n, tokens, _ = tile
    for columns in (n // 2, n, 2 * n):
        for run in (tokens // 2, tokens, 2 * tokens):
            yield from (launch.EnergyTile(t, columns, run, warps) for warps in (2, 4, 8))


def _pruned(pattern: Pattern) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda weight, energy: ops.prune_(weight, energy, pattern)


QUESTIONS = (
    *(
        Question("row_tile", shape, "2x32", _pruned(Pattern("50%")), _rows)
        for shape in ("4096x256", "11008x4096", "8192x11008", "4096x28672")
    ),
    Question("group_tile", "11008x4096", "2x32", _pruned(Pattern("2:4")), _tiles),
    Question("band_tile", "11008x4096", "2x32", _pruned(Pattern("50%", scope="matrix")), _tiles),
    *(
        Question("energy_tile", shape, "64x32", lambda x, _: ops.column_energy(x), _energies)
        for shape in ("4096x4096", "4096x11008")
    ),
)


def propose(device: torch.device, effort: Effort, deadline: float) -> Iterator[str]:
    """Lines of text, one for each entry asked about.

    Args:
        deadline: of time.monotonic(); what is not reached by then says so.
    """
    for question in QUESTIONS:
        shape = question.tiny if effort.is_rehearsal else question.shape
        if time.monotonic() > deadline:
            yield f"tune {question.function} {shape}: left out, the time is up"
            continue
        yield f"tune {question.function} {shape}: {_answer(question, shape, device, effort)}"


def _answer(question: Question, shape: str, device: torch.device, effort: Effort) -> str:
    original, energy = matrix(shape, torch.bfloat16, device)
    weight = original.clone()
    now = _present(question, weight)
    expected = question.call(weight, energy).clone()
    weight.copy_(original)
    candidates = [tile for tile in dict.fromkeys(question.others(now)) if tile != now and min(tile) > 0]
    variants: dict[str, Callable[[], torch.Tensor]] = {str(now): lambda: question.call(weight, energy)}
    for tile in candidates[:2] if effort.is_rehearsal else candidates:

        def call(tile: tuple[int, ...] = tile) -> torch.Tensor:
            with forced(question.function, tile):
                return question.call(weight, energy)

        try:
            agrees = torch.equal(call(), expected)
        except Exception:  # too many registers or too much shared memory: whatever the compiler says, not this one
            agrees = False
        weight.copy_(original)
        if agrees:
            variants[str(tile)] = call
    rounds = 1 if effort.is_rehearsal else effort.rounds
    times = interleave(variants, Clock(device), lambda: weight.copy_(original), rounds, effort.budget_s)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians, key=medians.__getitem__)
    mine = medians[str(now)]
    tried = f"of {len(variants)} that give the same result"
    if best == str(now) or medians[best] > GAIN * mine:
        return f"keep {now}, {mine:.4g} ms, {tried}"
    return f"take {best}, {medians[best]:.4g} ms instead of {mine:.4g} ms of {now}, {tried}"


def _present(question: Question, weight: torch.Tensor) -> tuple[int, ...]:
    choose = getattr(launch, question.function)
    if question.function == "group_tile":
        return choose(weight.shape[1])
    if question.function == "energy_tile":
        return choose(*weight.shape)
    if question.function == "row_tile":
        return choose(*weight.shape, *weight.stride(), weight.element_size())
    return choose(*weight.shape, *weight.stride())


@contextmanager
def forced(function: str, tile: tuple[int, ...]) -> Iterator[None]:
    """Inside the block the launch table gives this tile for everything."""
    usual = getattr(launch, function)
    setattr(launch, function, lambda *_: tile)
    try:
        yield
    finally:
        setattr(launch, function, usual)
