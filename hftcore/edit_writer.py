"""Write an Edit piece by piece, in any order, without holding it: the file is laid out before its first value is known."""

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hftcore.direct import DirectWriter
from hftcore.edit import CONFIG, TENSORS, Edit, TensorEdit, config_text

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
# the order in which the safetensors library lays out tensors: by descending dtype, then by name
ORDER = ("F32", "BF16", "F16", "U8")
WAITING = 1 << 23  # bytes of values that wait to be written at most


@dataclass(frozen=True)
class Slot:
    """What the file will hold for one parameter; `shape`, `dtype` and `transposed` as in `TensorEdit`.

    `rows` and `width` are those of the packed mask, `changed` is how many weights it will mark, `has_after` whether values after
    the edit are stored too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    rows: int
    width: int
    changed: int
    has_after: bool


class EditWriter:
    """The folder of an Edit whose slots are filled by position; what was written before a kill is kept when opened again.

    Args:
        folder: made if it does not exist.
        slots: parameter name -> `Slot`.
    """

    def __init__(self, folder: Path, slots: dict[str, Slot]) -> None:
        self.slots = slots
        self._folder = folder
        self._places, header, size = _layout(slots)
        self.file = folder / TENSORS
        folder.mkdir(exist_ok=True)
        if not self.file.exists() or self.file.stat().st_size != size:
            with self.file.open("wb") as empty:
                empty.write(header)
                empty.truncate(size)
        # what is written of a kind is mostly one run after another
        self._runs = {kind: DirectWriter(self.file) for kind in ("mask", "before", "after")}
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> "EditWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        for run in self._runs.values():
            run.close()

    def write(self, name: str, kind: Literal["mask", "before", "after"], start: int, values: Tensor) -> None:
        """Put rows of the "mask", or values of "before" or "after", at index `start` of those of a parameter.

        They are written beside other work and must not change any more; what goes wrong is raised by a later call.
        """
        place, row_bytes = self._places[f"{name}.{kind}"]
        data = values.flatten().view(torch.uint8)
        self._waiting.append((len(data), self._thread.submit(self._runs[kind].write, place + start * row_bytes, data)))
        while sum(size for size, _ in self._waiting) > WAITING:
            self._waiting.popleft()[1].result()

    def settle(self) -> list[Path]:
        """Write all that waits; the files it is in."""
        while self._waiting:
            self._waiting.popleft()[1].result()
        for run in self._runs.values():
            run.flush()
        return [self.file]

    def finish(self, recipe: dict[str, Any], fingerprints: dict[str, tuple[str, str]]) -> list[Path]:
        """Write the configuration, given the fingerprints before and after of each parameter; returns the files of the folder."""
        described = {
            name: {
                "shape": list(slot.shape),
                "dtype": _name(slot.dtype),
                "transposed": slot.transposed,
                "changed": slot.changed,
                "fingerprint_before": fingerprints[name][0],
                "fingerprint_after": fingerprints[name][1],
            }
            for name, slot in self.slots.items()
        }
        (self._folder / CONFIG).write_text(config_text(recipe, described), encoding="utf-8")
        return [*self.settle(), self._folder / CONFIG]

    def edit(self, recipe: dict[str, Any], fingerprints: dict[str, tuple[str, str]]) -> Edit:
        """What `Edit.load` gives for the finished folder, without counting the marks of every mask on the disk."""
        # not by the safetensors library: to look at a tensor makes the system read on for megabytes
        held = np.memmap(self.file, np.uint8, "c")
        entries = {
            name: TensorEdit(
                slot.shape,
                _name(slot.dtype),
                slot.transposed,
                self._mapped(held, f"{name}.mask", torch.uint8, slot.rows * slot.width).view(slot.rows, slot.width),
                self._mapped(held, f"{name}.before", slot.dtype, slot.changed),
                self._mapped(held, f"{name}.after", slot.dtype, slot.changed) if slot.has_after else None,
                *fingerprints[name],
            )
            for name, slot in self.slots.items()
        }
        return Edit(entries, recipe)

    def _mapped(self, held: np.ndarray, name: str, dtype: torch.dtype, count: int) -> Tensor:
        start = self._places[name][0]
        return torch.frombuffer(held, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(slots: dict[str, Slot]) -> tuple[dict[str, tuple[int, int]], bytes, int]:
    """Where each tensor starts and the bytes of one of its rows; the header; and the size of the file."""
    tensors: list[tuple[str, str, Sequence[int], int]] = []
    for name, slot in slots.items():
        tensors.append((CODES[torch.uint8], f"{name}.mask", [slot.rows, slot.width], slot.width))
        for kind in ("before", "after") if slot.has_after else ("before",):
            tensors.append((CODES[slot.dtype], f"{name}.{kind}", [slot.changed], slot.dtype.itemsize))
    tensors.sort(key=lambda tensor: (ORDER.index(tensor[0]), tensor[1].encode()))
    header, position, starts = {}, 0, {}
    for code, name, shape, row_bytes in tensors:
        starts[name] = position, row_bytes
        stop = position + shape[0] * row_bytes
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    places = {name: (data + start, row_bytes) for name, (start, row_bytes) in starts.items()}
    return places, len(text).to_bytes(8, "little") + text, data + position
