"""What the processes of a torch.distributed group tell each other: counts, energies, and that one of them failed.

A group is one of torch.distributed, or a tuple of those of some dimensions of a device mesh: the processes that these reach together.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hftcore.energy import Energy
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.searches import Found, Search

AT_ONCE = 1 << 24  # numbers of all processes together in memory at a time
# seconds for which a process looks for the others' answer before it sleeps: to wake an idle processor takes longer than the message
PATIENCE = 0.01
_let_others_run = getattr(os, "sched_yield", partial(time.sleep, 0))  # the latter on Windows


def size_of(group: Any) -> int:
    """How many processes a group has."""
    return math.prod(dist.get_world_size(line) for line in _lines(group))


def rank_in(group: Any) -> int:
    """Which of them this one is, in the order of `gather`."""
    rank = 0
    for line in _lines(group):
        rank = rank * dist.get_world_size(line) + dist.get_rank(line)
    return rank


def summed(numbers: Tensor, group: Any) -> Tensor:
    """The sum over all processes, element by element, on the CPU; for integers, whose sums have no order. `numbers` are given away."""
    for line in _lines(group):
        numbers = numbers.to(_carrier(line))
        with _reaching_all():
            _wait(dist.all_reduce(numbers, dist.ReduceOp.SUM, line, async_op=True))
    return numbers.cpu()


def gather(numbers: Tensor, group: Any) -> Tensor:
    """[processes, ...]: the numbers of each process, in the order of their ranks, on the CPU."""
    everyone = numbers[None]
    for line in reversed(_lines(group)):
        carried = everyone.contiguous().to(_carrier(line))
        each = [torch.zeros_like(carried) for _ in range(dist.get_world_size(line))]
        with _reaching_all():
            _wait(dist.all_gather(each, carried, line, async_op=True))
        everyone = torch.cat(each).cpu()
    return everyone


def side_by_side(searches: Sequence[Search[Found]], group: Any) -> list[Found]:
    """What each search finds; what all of them count in a round travels together. Every process has the same searches."""
    found: dict[int, Found] = {}
    counted: dict[int, Tensor] = {}

    def go_on(number: int, answer: Tensor | None) -> None:
        try:
            counted[number] = next(searches[number]) if answer is None else searches[number].send(answer)
        except StopIteration as end:
            found[number] = end.value

    for number in range(len(searches)):
        go_on(number, None)
    while counted:
        asked, counted = counted, {}
        flat = [one.flatten() for one in asked.values()]
        total = summed(torch.cat(flat) if len(flat) > 1 else flat[0], group)
        answers = total.split([one.numel() for one in asked.values()])
        for (number, one), answer in zip(asked.items(), answers, strict=True):
            go_on(number, answer.view_as(one))
    return [found[number] for number in range(len(searches))]


@dataclass
class Word:
    """What goes round at the end of a block with `together`.

    Fields:
        same: must be the same on all processes.
        is_any: after the block, whether it was set on one of them.
    """

    same: list[Any] = field(default_factory=list)
    is_any: bool = False


@contextmanager
def together(group: Any, kind: type[Exception] = Exception) -> Iterator[Word]:
    """A block that fails on every process if it fails on one: there with the error, on the others with its kind and text.

    Each process of the group goes through it, and waits for the others once, at its end. `group` None: just the block.

    Args:
        kind: the errors that are told. The block may wait for others only in what fails on all of them with such an error.

    Raises:
        HftcoreError: of another process (`NonFiniteError` if it was one); what must be the same is not; or another process is gone.
    """
    word = Word()
    if group is None:
        yield word
        return
    failure: Exception | None = None
    try:
        yield word
    except kind as error:
        failure = error
    digest = int.from_bytes(hashlib.sha256(repr(word.same).encode()).digest()[:7], "little")
    mine = None if failure is None else (isinstance(failure, NonFiniteError), _text(failure))
    try:
        told = gather(torch.tensor([failure is not None, word.is_any, digest]), group)
        word.is_any = bool(told[:, 1].any())
        if not bool(told[:, 0].any()) and bool((told[:, 2] == digest).all()):
            return
        said = _gather_objects((mine, word.same), group)
    except HftcoreError:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    for rank, (theirs, _) in enumerate(said):
        if theirs is not None:
            is_nonfinite, text = theirs
            raise (NonFiniteError if is_nonfinite else HftcoreError)(f"process {rank} of the group failed: {text}")
    for rank, (_, theirs) in enumerate(said):
        for one, other in zip_longest(word.same, theirs):
            if one != other:
                raise HftcoreError(
                    f"all processes must make the same call; process {rank} gave {other}, this one {one}"
                )


def add_up_(energy: Energy, group: Any) -> None:
    """Replace the energy of each process by the sum over all of them, `energy_0 + energy_1 + ...` bit for bit.

    Each process of the group makes the same call; all get the same bits. Values travel once to every process, 16 million at a time.

    Raises:
        HftcoreError: the processes hold different layers, or one is gone; nothing was changed.
    """
    shapes = {name: tuple(value.shape) for name, value in energy.items()}
    for rank, theirs in enumerate(_gather_objects((energy.average, shapes), group)):
        if theirs != (energy.average, shapes):
            odd = sorted({name for name, _ in shapes.items() ^ theirs[1].items()})[:3] or [theirs[0], energy.average]
            raise HftcoreError(
                f"the energies of all processes must be of the same layers; process {rank} differs in {odd}"
            )
    counts = [torch.tensor([energy.tokens, energy.samples]), *(count.cpu() for count in energy.expert_tokens.values())]
    counted = summed(torch.cat(counts), group).split([len(count) for count in counts])
    step = max(1, AT_ONCE // size_of(group))
    flat = [value.reshape(-1).cpu() for value in energy.values()]
    total = (
        torch.cat([_in_order(gather(part, group)) for part in torch.cat(flat).split(step)]) if flat else torch.empty(0)
    )
    for value, added in zip(energy.values(), total.split([len(value) for value in flat]), strict=True):
        value.copy_(added.view_as(value))
    energy.tokens, energy.samples = counted[0].tolist()
    for count, added in zip(energy.expert_tokens.values(), counted[1:], strict=True):
        count.copy_(added)


def _in_order(everyone: Tensor) -> Tensor:
    """[n]: the sum of [ranks, n], one rank after the other."""
    total = everyone[0].clone()
    for one in everyone[1:]:
        total += one
    return total


def _gather_objects(mine: Any, group: Any) -> list[Any]:
    everyone = [mine]
    for line in reversed(_lines(group)):
        each: list[Any] = [None] * dist.get_world_size(line)
        with _reaching_all():
            dist.all_gather_object(each, everyone, line)
        everyone = [one for several in each for one in several]
    return everyone


def _lines(group: Any) -> tuple[Any, ...]:
    return group if isinstance(group, tuple) else (group,)


def _wait(work: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not work.is_completed() and time.monotonic() < end:
        _let_others_run()
    work.wait()


@contextmanager
def _reaching_all() -> Iterator[None]:
    """Say of a collective that broke what that means."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and DistNetworkError are among them
        raise HftcoreError(
            f"another process of the group is gone, or did not answer within the group's timeout; nothing was changed ({_text(error)})"
        ) from error


def _text(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (HftcoreError, RuntimeError)) and text else f"{type(error).__name__}: {text}"


def _carrier(group: Any) -> torch.device:
    """Where the group's backend takes tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
