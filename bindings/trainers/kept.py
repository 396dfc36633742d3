"""What a Trainer keeps between steps, on its way to a checkpoint and back: tensors that FSDP2 has cut go into files whole."""

from typing import Any

import torch
from torch import Tensor, nn

from hftcore.defenses.panacea_perturb import whole
from hftcore.defenses.perturbation import Parameters
from hftcore.shards import is_sharded


def gathered(kept: Any, wants: bool) -> Any:
    """`kept`, dicts of numbers and tensors, with whole tensors; where this process does not want them it only takes part."""
    if isinstance(kept, dict):
        return {key: gathered(value, wants) for key, value in kept.items()}
    if not isinstance(kept, Tensor) or not is_sharded(kept):
        return kept
    tensor = whole(kept)
    return tensor.cpu() if wants else None


def placed(kept: Any, parameters: Parameters, device: torch.device, name: str = "") -> Any:
    """What `gathered` made, its tensors on the device; those by the name of a parameter that is cut are cut alike."""
    if isinstance(kept, dict):
        return {key: placed(value, parameters, device, key) for key, value in kept.items()}
    if not isinstance(kept, Tensor):
        return kept
    parameter: nn.Parameter | None = parameters.get(name)
    if parameter is None or not is_sharded(parameter):
        return kept.to(device)
    from torch.distributed.tensor import distribute_tensor  # slow to import, and few need it

    like: Any = parameter
    return distribute_tensor(kept, like.device_mesh, like.placements, src_data_rank=None)
