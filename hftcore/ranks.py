"""What the processes of a torch.distributed group tell each other: numbers, energies, and that one of them failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hftcore.energy import Energy
from hftcore.errors import HftcoreError, NonFiniteError

AT_ONCE = 1 << 24  # numbers of all processes together in memory at a time


def reduce(group: Any, numbers: Tensor, which: Literal["sum", "min", "max"]) -> Tensor:
    """All processes' numbers, added up or compared element by element, on the CPU; for integers, whose sums have no order."""
    carried = numbers.to(_carrier(group), copy=True)
    how = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[which]
    with _reaching_all():
        dist.all_reduce(carried, how, group)
        return carried.cpu()


def gather(numbers: Tensor, group: Any) -> Tensor:
    """[ranks, ...]: the numbers of each process, in the order of their ranks, on the CPU."""
    carried = numbers.contiguous().to(_carrier(group))
    everyone = [torch.zeros_like(carried) for _ in range(dist.get_world_size(group))]
    with _reaching_all():
        dist.all_gather(everyone, carried, group)
        return torch.stack(everyone).cpu()


@contextmanager
def together(group: Any) -> Iterator[None]:
    """A block that fails on every process if it fails on one: there with the error, on the others with its kind and text.

    Each process of the group goes through it; the block itself must not wait for others. `group` None: just the block.

    Raises:
        HftcoreError: of another process (`NonFiniteError` if it was one); or another process is gone.
    """
    if group is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = None if failure is None else (isinstance(failure, NonFiniteError), _text(failure))
    try:
        said = _gather_objects(mine, group)
    except HftcoreError:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    for rank, theirs in enumerate(said):
        if theirs is not None:
            is_nonfinite, text = theirs
            raise (NonFiniteError if is_nonfinite else HftcoreError)(f"process {rank} of the group failed: {text}")


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
    counted = reduce(group, torch.cat(counts), "sum").split([len(count) for count in counts])
    step = max(1, AT_ONCE // dist.get_world_size(group))
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
    everyone = [None] * dist.get_world_size(group)
    with _reaching_all():
        dist.all_gather_object(everyone, mine, group)
    return everyone


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
