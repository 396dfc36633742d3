"""The weights of a model that is not loaded: it is built without them, and they are read from its files block by block."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bindings.checkpoints.pieces import Piece, find_pieces
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import DTYPES, StoredTensor
from hftcore.bindings.models_io import quiet
from hftcore.errors import HftcoreError

ALIGNMENT = 64  # what torch gives every tensor on the CPU

Places = list[tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class Part:
    """A parameter or buffer to be read.

    Fields:
        places: every (dict of a module, key) that holds it.
        shape, dtype: in memory.
        pieces: where it lies in the files.
        start: its first byte among those of the parts that are read with it.
    """

    places: Places
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def mapped(self, device: torch.device) -> Tensor:
        """The tensor, on the CPU mapped from its file where it lies there as it is."""
        if len(self.pieces) == 1 and _lies_as_it_is(self.pieces, self.dtype):
            return self.pieces[0].mapped().view(self.shape).to(device)
        buffer = torch.empty(self.stop - self.start, dtype=torch.uint8)
        return self._read(buffer).to(device)

    def read(self, buffer: Tensor) -> Tensor:
        """The tensor, read into its bytes of `buffer`."""
        return self._read(buffer[self.start : self.stop])

    def _read(self, space: Tensor) -> Tensor:
        tensor = space.view(self.dtype).view(self.shape)
        for piece in self.pieces:
            rows = tensor.view(-1, piece.columns)[piece.first : piece.first + piece.rows] if tensor.numel() else tensor
            if piece.dtype == self.dtype:
                _read_bytes(piece, rows)
            else:
                rows.copy_(piece.mapped())
        return tensor


def build_model(folder: Path, stored: Mapping[str, StoredTensor], dtype: str, device: torch.device) -> Any:
    """The model that `from_pretrained` would load, in evaluation mode, but with parameters of one element each.

    Names, shapes, dtypes, ties and the buffers that no file holds are those of the loaded model.

    Args:
        folder, stored: the checkpoint and its tensors (`list_tensors`).
        dtype: "auto" for that of the files, or a torch dtype's name.
        device: where the parameters and buffers are.

    Raises:
        HftcoreError: what `load_skeleton` raises.
    """
    skeleton: Any = load_skeleton(folder, stored)
    kind = find_dtype(skeleton.config, stored) if dtype == "auto" else getattr(torch, dtype)
    named = {**dict(skeleton.named_parameters()), **_saved_buffers(skeleton)}
    state = {
        name: _standing(value.shape, kind if value.is_floating_point() else value.dtype)
        for name, value in named.items()
    }
    quiet()
    # transformers' own loading of these decides on dtypes and ties, and computes what no file holds
    model: Any = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=state, dtype=kind)
    standing: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in standing:
                element = _standing(parameter.shape, parameter.dtype, device)
                standing[parameter] = nn.Parameter(element, requires_grad=False)
            module._parameters[name] = standing[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.eval()


def find_dtype(config: Any, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype in which "auto" loads a checkpoint: what its configuration says, else that of the first float in its files."""
    found = config.dtype or next((DTYPES[place.dtype] for place in stored.values() if place.dtype in DTYPES), None)
    return torch.float32 if found is None else found


def by_name_in_memory(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors, those that are only renamed on loading under their names in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name, place in stored.items():
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converted is None:
            found[renamed] = place
        elif name not in known:  # what is converted is not what lies there, even if it is called so
            found[name] = place
    return found


def find_parts(model: nn.Module, modules: Collection[nn.Module], stored: Mapping[str, StoredTensor]) -> list[Part]:
    """What `modules`, some of the model's, hold and the files have.

    Raises:
        HftcoreError: the files lack one, or have it in another shape or dtype.
    """
    names = {id(value): name for name, value in (*model.named_parameters(), *_saved_buffers(model).items())}
    places: dict[int, Places] = {}
    values: dict[int, Tensor] = {}
    for module in modules:
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is not None and id(value) in names:
                    places.setdefault(id(value), []).append((held, key))
                    values[id(value)] = value
    parts: list[Part] = []
    position = 0
    for mark, value in values.items():
        pieces = find_pieces(names[mark], value.shape, False, stored)
        # a loaded model maps its files, and sums may depend on where a tensor starts
        offset = pieces[0].start % ALIGNMENT if _lies_as_it_is(pieces, value.dtype) else 0
        position += (offset - position) % ALIGNMENT
        parts.append(Part(places[mark], tuple(value.shape), value.dtype, pieces, position))
        position = parts[-1].stop
    return parts


@contextmanager
def filled(parts: Sequence[Part], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let the model hold `tensors` in the places of the parts."""
    before = [[held[key] for held, key in part.places] for part in parts]
    try:
        for part, tensor in zip(parts, tensors, strict=True):
            held, key = part.places[0]
            # tied places hold one parameter
            value = nn.Parameter(tensor, requires_grad=False) if isinstance(held[key], nn.Parameter) else tensor
            for held, key in part.places:
                held[key] = value
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            for (held, key), value in zip(part.places, values, strict=True):
                held[key] = value


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints hold."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _standing(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


def _lies_as_it_is(pieces: Sequence[Piece], dtype: torch.dtype) -> bool:
    """Whether a parameter lies in one stretch of a file, in its dtype, and where it can be looked at as such."""
    first = pieces[0]
    in_line = all(a.stop == b.start and a.file == b.file for a, b in pairwise(pieces))
    return (
        in_line
        and len({piece.stored for piece in pieces}) == 1
        and first.dtype == dtype
        and first.start % dtype.itemsize == 0
    )


def _read_bytes(piece: Piece, rows: Tensor) -> None:
    left = rows.reshape(-1).view(torch.uint8).numpy().data
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.start)
        while len(left):
            count = file.readinto(left)
            if not count:
                raise HftcoreError(f"{piece.file} ended {len(left)} bytes early; was it changed while it was read?")
            left = left[count:]
