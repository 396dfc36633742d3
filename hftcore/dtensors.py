"""DTensor weights, as FSDP2 and tensor parallelism leave them: what a process holds of them, and pruning a model of them in place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from hftcore import ops
from hftcore.distributed import Cutting, Shard, sharded_masks
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets
from hftcore.matching import energy_layers, refuse_unmeasured
from hftcore.pattern import Pattern
from hftcore.ranks import reduce


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
        pieces = energy.chunk(weight.device_mesh.size(dimension))
        place = weight.device_mesh.get_local_rank(dimension)
        energy = pieces[place] if place < len(pieces) else energy[:0]
        if len(energy) != local.shape[1]:
            raise HftcoreError(
                f"weight is not cut as torch.chunk cuts: {local.shape[1]} columns here, not {len(energy)}; redistribute it"
            )
    return Shard(local, energy, cut, other), weight.device_mesh.get_group(dimension)


def prune_sharded(
    model: nn.Module,
    energy: Energy,
    pattern: Pattern | str,
    targets: Targets | None = None,
    exclude: Targets | None = None,
) -> dict[str, Tensor]:
    """Prune a model whose weights are DTensors (`fully_shard`, `parallelize_module`) or whole, in place.

    The masks are those of `hftcore.prune` on one process, bit for bit. Weights are changed only when every process has all of its
    masks. There is no Edit: keep a copy of the model to go back.

    Args:
        energy: of the layers, the same on every process, as `hftcore.calibrate(..., group=...)` gives it.
        pattern: scope "row", "matrix" or "model", or "n:m"; no blocks.
        targets, exclude: which of the energy's layers, see `hftcore.prune`.

    Returns:
        Tensor name -> [m, ceil(n / 8)] uint8, this process's part of the mask, 1 = removed.

    Raises:
        HftcoreError: as `sharded_mask`, `shard_of` and `hftcore.prune`; for scope "model" also weights cut over several groups.
    """
    pattern = Pattern.of(pattern)
    layers = sorted(energy_layers(model, energy, targets, exclude), key=lambda layer: layer.tensor)
    refuse_unmeasured(energy)
    if fused := [layer.tensor for layer in layers if layer.is_fused]:
        raise HftcoreError(f"fused experts are not there for sharded models, got {fused[0]}; exclude them")
    held = [shard_of(layer.weight, energy[layer.name]) for layer in layers]
    groups = [group for _, group in held]
    if pattern.scope == "model":
        cut = [group for group in groups if group is not None]
        if any(group != cut[0] for group in cut):
            raise HftcoreError('scope "model" needs weights that are cut over one group; use "matrix" or "row"')
        groups = [cut[0] if cut else None] * len(held)
    masks: dict[str, Tensor] = {}
    for over in dict.fromkeys(groups):
        mine = [
            (layer.tensor, shard)
            for layer, (shard, _), group in zip(layers, held, groups, strict=True)
            if group == over
        ]
        found = sharded_masks([shard for _, shard in mine], pattern, over)
        masks |= {name: mask for (name, _), mask in zip(mine, found, strict=True)}
    for group in dict.fromkeys(groups):
        reduce(group, torch.zeros(1, dtype=torch.int64), "sum")
    for layer, (shard, _) in zip(layers, held, strict=True):
        ops.masked_put_(shard.weight, masks[layer.tensor], None)
    return {layer.tensor: masks[layer.tensor] for layer in layers}


def _cut_dimension(weight: Tensor) -> int | None:
    """The dimension of the mesh over which a weight is cut, None where every process has it whole."""
    if not isinstance(weight, DTensor):
        return None
    cut = [dimension for dimension, placement in enumerate(weight.placements) if type(placement) is not Replicate]
    if not cut:
        return None
    if len(cut) > 1 or type(weight.placements[cut[0]]) is not Cut or weight.dim() != 2:
        raise HftcoreError(
            f"weight must be a matrix that is cut by rows or columns over one dimension of its mesh, got {list(weight.placements)} "
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
