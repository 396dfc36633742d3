"""Where the parameters of a model lie in a checkpoint's files: in one stored tensor, or as the matrices of their experts."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hftcore.bindings.checkpoints.stored import DTYPES, StoredTensor
from hftcore.errors import HftcoreError

_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.[^.]+(\.weight)?$")
# how fused experts are split in files: (their module's name in memory, on disk), and the matrices that follow each other in one
_EXPERTS = (
    (("mlp.experts", "mlp.experts"), {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    (("mlp.experts", "block_sparse_moe.experts"), {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)


@dataclass(frozen=True)
class Piece:
    """One matrix of a parameter, or some of its rows, where it lies in a file.

    Fields:
        parameter: the parameter's name in memory.
        stored: the name of the stored tensor.
        file, start, stop: the bytes it lies in.
        dtype: of its elements.
        rows, columns: its size in [out, in] orientation.
        first: number of its first row among all rows of the parameter, experts one below the other.
        expert: which matrix of the parameter it belongs to; 0 if there is one only.
        transposed: it lies there as [columns, rows].
    """

    parameter: str
    stored: str
    file: Path
    start: int
    stop: int
    dtype: torch.dtype
    rows: int
    columns: int
    first: int
    expert: int
    transposed: bool

    def mapped(self) -> Tensor:
        """The matrix as it lies in the file, mapped: read when used, and never written back."""
        shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        if self.start == self.stop:
            return torch.zeros(shape, dtype=self.dtype)
        region = np.memmap(self.file, np.uint8, "c", self.start, self.stop - self.start)
        return torch.frombuffer(region, dtype=self.dtype).view(shape)

    def weight(self) -> Tensor:
        """[rows, columns]: the mapped matrix in [out, in] orientation."""
        return self.mapped().t() if self.transposed else self.mapped()


def find_pieces(
    parameter: str, shape: Sequence[int], transposed: bool, stored: Mapping[str, StoredTensor]
) -> list[Piece]:
    """The pieces of a parameter, in the order of their rows.

    Args:
        parameter: its name in memory.
        shape: its shape in memory, [M, N], [N, M] if transposed, or with the experts' axis in front.
        transposed: stored [.., in, out].
        stored: what `list_tensors` found.

    Raises:
        HftcoreError: the files have no such tensor, or in another shape, or not in float32, bfloat16 or float16.
    """
    name = next((name for name in names_on_disk(parameter) if name in stored), None)
    if name is not None:
        place = stored[name]
        _check(parameter, [place], place.shape == tuple(shape), shape)
        return _matrices(parameter, name, place, transposed)
    names = _expert_names(parameter, shape, transposed, stored)
    if not names:
        raise HftcoreError(
            f"the checkpoint has no tensor {parameter!r}; if its files name or split tensors in another way than the model, "
            "work on the model in memory and save it with save_pretrained"
        )
    places = [stored[name] for name in names]
    fits = sum(place.shape[0] for place in places) == math.prod(shape[:-1])
    _check(parameter, places, fits and {place.shape[1:] for place in places} == {tuple(shape[-1:])}, shape)
    pieces, first = [], 0
    for name, place in zip(names, places, strict=True):
        rows, columns = place.shape
        bounds = place.file, place.start, place.stop, DTYPES[place.dtype]
        pieces.append(Piece(parameter, name, *bounds, rows, columns, first, first // shape[1], False))
        first += rows
    return pieces


def _check(parameter: str, places: Sequence[StoredTensor], fits: bool, shape: Sequence[int]) -> None:
    dtypes = sorted({place.dtype for place in places})
    where = f"{parameter} in {places[0].file.name}"
    if not fits:
        raise HftcoreError(f"{where} is {list(places[0].shape)}, wanted {list(shape)}; is this the right checkpoint?")
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise HftcoreError(
            f"{where} is {' and '.join(dtypes)}, wanted one of {', '.join(DTYPES)}; dequantise the checkpoint first"
        )


def _matrices(parameter: str, name: str, place: StoredTensor, transposed: bool) -> list[Piece]:
    # a vector is one row
    *experts, rows, columns = (1,) * (2 - len(place.shape)) + place.shape
    if transposed:
        rows, columns = columns, rows
    count = math.prod(experts)
    size = (place.stop - place.start) // max(1, count)
    return [
        Piece(
            parameter,
            name,
            place.file,
            place.start + expert * size,
            place.start + (expert + 1) * size,
            DTYPES[place.dtype],
            rows,
            columns,
            expert * rows,
            expert,
            transposed,
        )
        for expert in range(count)
    ]


def _expert_names(
    parameter: str, shape: Sequence[int], transposed: bool, stored: Mapping[str, StoredTensor]
) -> list[str]:
    """The stored matrices of fused experts, expert by expert; empty if the files do not hold them all."""
    module, _, fused = parameter.rpartition(".")
    if len(shape) != 3 or transposed:
        return []
    for (in_memory, on_disk), matrices in _EXPERTS:
        prefix = module.removesuffix(in_memory) + on_disk
        names = [f"{prefix}.{expert}.{part}.weight" for expert in range(shape[0]) for part in matrices.get(fused, ())]
        if names and all(name in stored and len(stored[name].shape) == 2 for name in names):
            return names
    return []


def names_on_disk(name: str) -> list[str]:
    """Names under which a parameter may be stored, the likeliest first.

    PEFT leaves the adapter's name out; a base model inside PEFT has a prefix and wrapped layers; older checkpoints
    lack the prefix of the model's body.

    >>> names_on_disk("base_model.model.q_proj.lora_A.default.weight")[1]
    'base_model.model.q_proj.lora_A.weight'
    """
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return list(dict.fromkeys([name, _ADAPTER.sub(r".\1\2", name), plain, plain.partition(".")[2]]))
