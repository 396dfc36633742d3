"""DTensor weights, as FSDP2 and tensor parallelism leave them: what a process holds of them, and pruning a model of them in place."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from hftcore import ops
from hftcore.distributed import Shard, sharded_masks
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets
from hftcore.matching import energy_layers, refuse_unmeasured
from hftcore.pattern import Pattern
from hftcore.ranks import together
from hftcore.shards import held

Lines = tuple[Any, ...]  # groups of torch.distributed, of some dimensions of a mesh


def shard_of(
    weight: Tensor, energy: Tensor, reference: Tensor | None = None, scope: Literal["row", "matrix"] = "matrix"
) -> tuple[Shard, Lines]:
    """What this process holds of a weight, without a copy, and the group of the processes that hold the rest.

    Args:
        weight: [M, N]; a DTensor whose rows, columns or both are cut over some dimensions of its mesh (`fully_shard`,
            `parallelize_module`, both), and replicated over the others; or a tensor that each process holds whole.
        energy: [N] float32, of all columns, as `hftcore.calibrate` gives it.
        reference: placed as `weight`, or None.
        scope: what is to be compared; of a row only the processes that share its columns hold the rest.

    Returns:
        (shard, group), the group a tuple as `sharded_mask` takes it; empty where this process holds all that is compared.

    Raises:
        HftcoreError: a weight that is placed otherwise, or an energy or reference that does not fit it.

    >>> shard, group = shard_of(torch.ones(2, 4), torch.ones(4))
    >>> shard.whole, group
    ((2, 4), ())
    """
    if weight.dim() != 2:
        raise HftcoreError(
            f"weight must be a matrix, got shape {tuple(weight.shape)}; use expert_shards for fused experts"
        )
    if reference is not None and _placing(weight) != _placing(reference):
        raise HftcoreError(f"reference must be placed as weight, {_placing(weight)}, got {_placing(reference)}")
    if energy.shape != weight.shape[-1:]:
        raise HftcoreError(
            f"energy must have a value for each of the {weight.shape[-1]} columns, got {tuple(energy.shape)}"
        )
    local = held(weight)
    (row, _), (column, columns) = _box(weight)
    mine = energy.to(local.device)[column : column + columns]
    other = None if reference is None else held(reference)
    return Shard(local, mine, _shape(weight), row, column, other), _lines(weight, scope)


def expert_shards(
    weight: Tensor, energy: Tensor, scope: Literal["row", "matrix"] = "matrix"
) -> tuple[list[Shard], Lines]:
    """What this process holds of each matrix of fused experts, without a copy, and the group of those that hold the rest.

    Args:
        weight: [E, M, N]; a DTensor whose experts, rows or columns are cut over some dimensions of its mesh (`fully_shard`, expert
            and tensor parallelism), and replicated over the others; or a tensor that each process holds whole.
        energy: [E, N] float32, as `hftcore.calibrate` gives it.
        scope: as for `shard_of`.

    Returns:
        (a shard for each expert, group): an expert that lies elsewhere has no rows here; the group is as that of `shard_of`.

    Raises:
        HftcoreError: a weight that is placed otherwise.

    >>> [shard.whole for shard in expert_shards(torch.ones(3, 2, 4), torch.ones(3, 4))[0]]
    [(2, 4), (2, 4), (2, 4)]
    """
    local = held(weight)
    (first, experts), (row, _), (column, columns) = _box(weight)
    mine = energy.to(local.device)[:, column : column + columns]
    absent = local.new_empty(0, columns)
    shards = []
    for expert, measured in enumerate(mine):
        is_here = first <= expert < first + experts
        shards.append(Shard(local[expert - first] if is_here else absent, measured, _shape(weight), row, column))
    return shards, _lines(weight, scope)


def prune_sharded(
    model: nn.Module,
    energy: Energy,
    pattern: Pattern | str,
    targets: Targets | None = None,
    exclude: Targets | None = None,
) -> dict[str, Tensor]:
    """Prune a model whose weights are DTensors (`fully_shard`, `parallelize_module`, both) or whole, in place.

    The masks are those of `hftcore.prune` on one process, bit for bit. Weights are changed only when every process of the weights'
    meshes has all of its masks. There is no Edit: keep a copy of the model to go back. Weights that a forward pass of FSDP2 left
    gathered are let go.

    Args:
        energy: of the layers, the same on every process, as `hftcore.calibrate(..., group=...)` gives it.
        pattern: scope "row", "matrix" or "model", or "n:m"; no blocks.
        targets, exclude: which of the energy's layers, see `hftcore.prune`.

    Returns:
        Tensor name -> [m, ceil(n / 8)] uint8, this process's part of the mask, 1 = removed; of fused experts its rows of each, one
        below the other.

    Raises:
        HftcoreError: as `sharded_mask`, `shard_of` and `hftcore.prune`; for scope "model" also weights cut over several meshes.
    """
    pattern = Pattern.of(pattern)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # what a forward pass left gathered is a copy, to which changes would be lost
            module.reshard()
    placed = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    everyone = _of_different_ranks(line for weight in placed for line in weight.device_mesh.get_all_groups())
    with together(everyone):
        layers = sorted(energy_layers(model, energy, targets, exclude), key=lambda layer: layer.tensor)
        refuse_unmeasured(energy)
        parts = {layer.tensor: _shards_of(layer, energy, pattern) for layer in layers}
        if pattern.scope == "model":
            parts = _over_one_group(parts, layers)
        masks = {name: [shard.empty_mask() for shard in shards] for name, (shards, _) in parts.items()}
    for ranks, over in {tuple(map(_ranks, lines)): lines for _, lines in parts.values()}.items():
        mine = [
            (layer.tensor, number, shard)
            for layer in layers
            for number, shard in enumerate(parts[layer.tensor][0])
            if tuple(map(_ranks, parts[layer.tensor][1])) == ranks
            and not (pattern.invert and number in energy.idle(layer.name))
        ]
        # what is wrong here is known to those that compare together, and must be to all before they turn to what is cut otherwise
        with together(everyone, HftcoreError):
            found = sharded_masks([shard for _, _, shard in mine], pattern, over)
        for (name, number, _), mask in zip(mine, found, strict=True):
            masks[name][number] = mask
    for name, (shards, _) in parts.items():
        for shard, mask in zip(shards, masks[name], strict=True):
            ops.masked_put_(shard.weight, mask, None)
    return {name: torch.cat(pieces) for name, pieces in masks.items()}


Parts = dict[str, tuple[list[Shard], Lines]]


def _shards_of(layer: Layer, energy: Energy, pattern: Pattern) -> tuple[list[Shard], Lines]:
    """What this process holds of each matrix of a layer, and the group."""
    scope: Literal["row", "matrix"] = "row" if pattern.scope == "row" else "matrix"
    if layer.is_fused:
        shards, lines = expert_shards(layer.weight, energy[layer.name], scope)
    else:
        shard, lines = shard_of(layer.weight, energy[layer.name], None, scope)
        shards = [shard]
    # n:m compares what lies side by side on each process
    return shards, () if pattern.group is not None else lines


def _over_one_group(parts: Parts, layers: Sequence[Layer]) -> Parts:
    """The parts for one comparison over all dimensions of the mesh that cut some of them; what others hold too counts on the first."""
    meshes = [layer.weight.device_mesh.get_all_groups() for layer in layers if isinstance(layer.weight, DTensor)]
    cutting = {_ranks(line) for _, lines in parts.values() for line in lines}
    over = tuple(line for line in max(meshes, key=len, default=[]) if _ranks(line) in cutting)
    if len(over) < len(cutting):
        raise HftcoreError('scope "model" needs weights that are cut over one mesh; use "matrix" or "row"')
    return {
        name: (
            [replace(shard, is_counted=_is_first(over, lines)) for shard in shards],
            over,
        )
        for name, (shards, lines) in parts.items()
    }


def _is_first(over: Lines, lines: Lines) -> bool:
    """Whether this process is the first of those that hold the same of a weight, which is cut only over `lines`."""
    cutting = {_ranks(line) for line in lines}
    return all(dist.get_rank(line) == 0 for line in over if _ranks(line) not in cutting)


def _ranks(line: Any) -> tuple[int, ...]:
    """What tells groups apart: meshes that are alike may have groups of their own, and torch passes one mesh for the other."""
    return tuple(dist.get_process_group_ranks(line))


def _of_different_ranks(lines: Iterable[Any]) -> Lines:
    return tuple({_ranks(line): line for line in lines}.values())


def _box(weight: Tensor) -> list[tuple[int, int]]:
    """(first, size) in each dimension of what this process holds.

    FSDP2 cuts what tensor parallelism left of a dimension, so such a placement, which is called strided and names in how many
    parts the dimension was, cuts last although its dimension of the mesh comes first.
    """
    box = [(0, size) for size in weight.shape]
    if not isinstance(weight, DTensor):
        return box
    mesh, here = weight.device_mesh, weight.device_mesh.get_coordinate()
    if here is None:
        raise HftcoreError(f"this process must belong to the mesh of weight, {mesh}")
    placements: Any = weight.placements
    plain = [line for line, placement in enumerate(placements) if type(placement) is Cut]
    strided = [line for line in range(len(placements)) if _is_strided(line, placements, mesh)]
    if any(
        type(placement) is not Replicate and line not in plain + strided for line, placement in enumerate(placements)
    ):
        raise HftcoreError(
            f"weight must be replicated or cut over each dimension of its mesh, got {list(placements)}; redistribute it"
        )
    for line in plain + strided:
        place = dist.get_rank(mesh.get_group(line))
        if place != here[line]:
            # torch scatters and gathers by the order of the group
            raise HftcoreError(
                f"the ranks of the mesh must ascend where weight is cut, got place {here[line]} of dimension {line} for process "
                f"{place} of its group; redistribute it"
            )
        axis = placements[line].dim
        first, size = box[axis]
        step = -(-size // mesh.size(line))
        skipped = min(size, step * here[line])
        box[axis] = first + skipped, min(step, size - skipped)
    sizes, local = tuple(size for _, size in box), tuple(held(weight).shape)
    if sizes != local:
        raise HftcoreError(f"weight is not cut as torch.chunk cuts: {local} here, not {sizes}; redistribute it")
    return box


def _is_strided(line: int, placements: Any, mesh: DeviceMesh) -> bool:
    """Whether the dimension of the mesh cuts what the later ones, one by one, left of a dimension of the weight."""
    alike = [
        other
        for other, placement in enumerate(placements)
        if getattr(placement, "dim", None) == getattr(placements[line], "dim", None)
    ]
    later = [other for other in alike if other > line and type(placements[other]) is Cut]
    return (
        type(placements[line]).__name__ == "_StridedShard"
        and all(type(placements[other]) is Cut for other in alike if other != line)
        and placements[line].split_factor == prod(mesh.size(other) for other in later)
    )


def _lines(weight: Tensor, scope: Literal["row", "matrix"]) -> Lines:
    """The groups over which what the scope compares is cut."""
    if not isinstance(weight, DTensor):
        return ()
    last, placements = weight.dim() - 1, cast(Any, weight.placements)
    return tuple(
        weight.device_mesh.get_group(line)
        for line, placement in enumerate(placements)
        if type(placement) is not Replicate and (scope == "matrix" or placement.dim == last)
    )


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[-2], weight.shape[-1]


def _placing(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else "whole"
