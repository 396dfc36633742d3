"""The ops as `torch.ops.hftcore.*`: what torch.compile sees of them. A direct call goes past the dispatcher."""

import torch
from torch import Tensor

from hftcore.ops.energy import column_energy
from hftcore.ops.removal import prune_, prune_mask


def _prune_nothing_returned(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> None:
    prune_(weight, energy, pattern, reference)  # a registered op may not return its own argument


_library = torch.library.Library("hftcore", "DEF")
_library.define("column_energy(Tensor x, Tensor? mask) -> Tensor")
_library.define("prune_mask(Tensor weight, Tensor energy, str pattern, Tensor? reference) -> Tensor")
_library.define("prune_(Tensor(a!) weight, Tensor energy, str pattern, Tensor? reference) -> ()")
_library.impl("column_energy", column_energy, "CompositeExplicitAutograd")
_library.impl("prune_mask", prune_mask, "CompositeExplicitAutograd")
_library.impl("prune_", _prune_nothing_returned, "CompositeExplicitAutograd")


@torch.library.register_fake("hftcore::column_energy", lib=_library)
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("hftcore::prune_mask", lib=_library)
def _(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)


@torch.library.register_fake("hftcore::prune_", lib=_library)
def _(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> None:
    return None
