"""DTensor weights, as FSDP2 and tensor parallelism leave them: what a process holds of them, and pruning a model of them in place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from hftcore import ops
from hftcore.distributed import Cutting, Shard, sharded_masks
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets
from hftcore.matching import energy_layers, refuse_unmeasured
from hftcore.pattern import Pattern
from hftcore.ranks import reduce
from hftcore.shards import held


def shard_of(weight: Tensor, energy: Tensor, reference: Tensor | None = None) -> tuple[Shard, Any]:
    """What this process holds of a weight, without a copy, and the group of the processes that hold the rest.

    Args:
        weight: [M, N]; a DTensor cut by rows (FSDP2, column-wise tensor parallelism) or by columns (row-wise tensor parallelism)
            over one dimension of its mesh and replicated over the others; or a tensor that each process holds whole.
        energy: [N] float32, of all columns, as `hftcore.calibrate` gives it.
        reference: placed as `weight`, or None.

    Returns:
        (shard, group); the group is None where nothing is cut, and the shard's cut is then "whole".

    Raises:
        HftcoreError: a weight that is placed otherwise, or an energy or reference that does not fit it.

    >>> shard_of(torch.ones(2, 4), torch.ones(4))[0].cut
    'whole'
    """
    if (reference is not None) and _placing(weight) != _placing(reference):
        raise HftcoreError(f"reference must be placed as weight, {_placing(weight)}, got {_placing(reference)}")
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    other = reference.to_local() if isinstance(reference, DTensor) else reference
    energy = energy.to(local.device)
    if energy.shape != weight.shape[-1:]:
        raise HftcoreError(
            f"energy must have a value for each of the {weight.shape[-1]} columns, got {tuple(energy.shape)}"
        )
    dimension = _cut_dimension(weight)
    if dimension is None or not isinstance(weight, DTensor):
        return Shard(local, energy, "whole", other), None
    cut: Cutting = "rows" if weight.placements[dimension].is_shard(0) else "columns"
    if cut == "columns":
        energy = _part_of(energy, 0, weight, dimension, local.shape[1])
    return Shard(local, energy, cut, other), weight.device_mesh.get_group(dimension)


def expert_shards(weight: Tensor, energy: Tensor) -> tuple[list[Shard], Any]:
    """What this process holds of each matrix of fused experts, without a copy, and the group of those that hold the rest.

    Args:
        weight: [E, M, N]; a DTensor cut by experts (FSDP2, expert parallelism), by rows or by columns over one dimension of its mesh
            and replicated over the others; or a tensor that each process holds whole.
        energy: [E, N] float32, as `hftcore.calibrate` gives it.

    Returns:
        (a shard for each expert, group): an expert that lies elsewhere has no rows here; the group is None where nothing is cut.

    Raises:
        HftcoreError: a weight that is placed otherwise.

    >>> [shard.cut for shard in expert_shards(torch.ones(3, 2, 4), torch.ones(3, 4))[0]]
    ['whole', 'whole', 'whole']
    """
    local = held(weight)
    energy = energy.to(local.device)
    dimension = _cut_dimension(weight)
    if dimension is None or not isinstance(weight, DTensor):
        return [Shard(one, measured, "whole") for one, measured in zip(local, energy, strict=True)], None
    group = weight.device_mesh.get_group(dimension)
    if weight.placements[dimension].is_shard(0):
        mine = _part_of(torch.arange(weight.shape[0]), 0, weight, dimension, len(local)).tolist()
        here = dict(zip(mine, local, strict=True))
        absent = local.new_empty(0, local.shape[-1])
        return [Shard(here.get(expert, absent), measured, "rows") for expert, measured in enumerate(energy)], group
    cut: Cutting = "rows"
    if weight.placements[dimension].is_shard(2):
        cut, energy = "columns", _part_of(energy, 1, weight, dimension, local.shape[2])
    return [Shard(one, measured, cut) for one, measured in zip(local, energy, strict=True)], group


def prune_sharded(
    model: nn.Module,
    energy: Energy,
    pattern: Pattern | str,
    targets: Targets | None = None,
    exclude: Targets | None = None,
) -> dict[str, Tensor]:
    """Prune a model whose weights are DTensors (`fully_shard`, `parallelize_module`) or whole, in place.

    The masks are those of `hftcore.prune` on one process, bit for bit. Weights are changed only when every process has all of its
    masks. There is no Edit: keep a copy of the model to go back. Weights that a forward pass of FSDP2 left gathered are let go.

    Args:
        energy: of the layers, the same on every process, as `hftcore.calibrate(..., group=...)` gives it.
        pattern: scope "row", "matrix" or "model", or "n:m"; no blocks.
        targets, exclude: which of the energy's layers, see `hftcore.prune`.

    Returns:
        Tensor name -> [m, ceil(n / 8)] uint8, this process's part of the mask, 1 = removed; of fused experts its rows of each, one
        below the other.

    Raises:
        HftcoreError: as `sharded_mask`, `shard_of` and `hftcore.prune`; for scope "model" also weights cut over several groups.
    """
    pattern = Pattern.of(pattern)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # what a forward pass left gathered is a copy, to which changes would be lost
            module.reshard()
    layers = sorted(energy_layers(model, energy, targets, exclude), key=lambda layer: layer.tensor)
    refuse_unmeasured(energy)
    parts = {layer.tensor: _shards_of(layer, energy) for layer in layers}
    groups = [group for _, group in parts.values()]
    if pattern.scope == "model":
        cut = [group for group in groups if group is not None]
        if any(group != cut[0] for group in cut):
            raise HftcoreError('scope "model" needs weights that are cut over one group; use "matrix" or "row"')
        groups = [cut[0] if cut else None] * len(parts)
    masks = {name: [_nothing(shard.weight) for shard in shards] for name, (shards, _) in parts.items()}
    for over in dict.fromkeys(groups):
        mine = [
            (layer.tensor, number, shard)
            for layer, group in zip(layers, groups, strict=True)
            for number, shard in enumerate(parts[layer.tensor][0])
            if group == over and not (pattern.invert and number in energy.idle(layer.name))
        ]
        found = sharded_masks([shard for _, _, shard in mine], pattern, over)
        for (name, number, _), mask in zip(mine, found, strict=True):
            masks[name][number] = mask
    for group in dict.fromkeys(groups):
        reduce(group, torch.zeros(1, dtype=torch.int64), "sum")
    for name, (shards, _) in parts.items():
        for shard, mask in zip(shards, masks[name], strict=True):
            ops.masked_put_(shard.weight, mask, None)
    return {name: torch.cat(pieces) for name, pieces in masks.items()}


def _shards_of(layer: Layer, energy: Energy) -> tuple[list[Shard], Any]:
    """What this process holds of each matrix of a layer, and the group."""
    if layer.is_fused:
        return expert_shards(layer.weight, energy[layer.name])
    shard, group = shard_of(layer.weight, energy[layer.name])
    return [shard], group


def _nothing(weight: Tensor) -> Tensor:
    """The mask that removes nothing."""
    return torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8, device=weight.device)


def _part_of(whole: Tensor, axis: int, weight: DTensor, dimension: int, size: int) -> Tensor:
    """This process's part of a tensor that is cut along `axis` as the weight is; `size` is what it must have there."""
    pieces = whole.chunk(weight.device_mesh.size(dimension), axis)
    place = weight.device_mesh.get_local_rank(dimension)
    part = pieces[place] if place < len(pieces) else whole.narrow(axis, 0, 0)
    if part.shape[axis] != size:
        raise HftcoreError(
            f"weight is not cut as torch.chunk cuts: {size} of {whole.shape[axis]} here, not {part.shape[axis]}; redistribute it"
        )
    return part


def _cut_dimension(weight: Tensor) -> int | None:
    """The dimension of the mesh over which a weight is cut, None where every process has it whole."""
    if not isinstance(weight, DTensor):
        return None
    cut = [dimension for dimension, placement in enumerate(weight.placements) if type(placement) is not Replicate]
    if not cut:
        return None
    if len(cut) > 1 or type(weight.placements[cut[0]]) is not Cut or weight.dim() not in (2, 3):
        raise HftcoreError(
            f"weight must be a matrix, or one for each expert, that is cut over one dimension of its mesh, got {list(weight.placements)} "
            f"of shape {tuple(weight.shape)}; redistribute it"
        )
    mesh = weight.device_mesh
    here = list(mesh.get_coordinate() or [])
    line = mesh.mesh[
        tuple(slice(None) if dimension == cut[0] else place for dimension, place in enumerate(here))
    ].tolist()
    if line != sorted(line):
        raise HftcoreError(f"the ranks of the mesh must ascend where weight is cut, got {line}; redistribute it")
    return cut[0]


def _placing(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else "whole"
