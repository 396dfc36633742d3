"""What FSDP2 leaves of a tensor: the part of a DTensor that this process holds. Costs nothing where nothing is sharded."""

from typing import Any, cast

from torch import Tensor

Cut = tuple[Any, tuple[int, ...]]  # a device mesh, and those of its dimensions over which a tensor lies in parts


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def held(tensor: Tensor) -> Tensor:
    """The part that this process holds, without a copy; of a plain tensor all."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def cut_of(tensor: Tensor) -> Cut | None:
    """How a tensor is spread; None where this process holds all of it."""
    if not is_sharded(tensor):
        return None
    placed = cast(Any, tensor)
    dimensions = tuple(i for i, placement in enumerate(placed.placements) if not placement.is_replicate())
    return (placed.device_mesh, dimensions) if dimensions else None


def add_parts(sums: Tensor, cut: Cut | None) -> Tensor:
    """The sum over the processes among which tensors are cut, in place; each of them makes the call."""
    if cut is None:
        return sums
    import torch.distributed as dist

    mesh, dimensions = cut
    for dimension in dimensions:
        dist.all_reduce(sums, group=mesh.get_group(dimension))
    return sums


def mean_part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of the mean over processes of `value`, a whole tensor of which each has its own, placed as `like`."""
    from torch.distributed.tensor import DTensor, Partial  # slow to import, and few need it

    placed = cast(DTensor, like)
    mesh = placed.device_mesh
    every = DTensor.from_local(value / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return every.redistribute(placements=placed.placements)
