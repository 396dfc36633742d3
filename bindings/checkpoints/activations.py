"""Activations that may be more than fits into memory."""

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from hftcore.errors import HftcoreError


class Activations(dict[int, Tensor]):
    """Number -> tensor, like a dict. Up to `budget` bytes are kept in memory, the rest in a file that is mapped.

    The file has no name, so it is gone after `close`, and when the process ends in whatever way. Tensors of a GPU are kept in the
    CPU's memory.

    Args:
        budget: bytes of memory for all tensors together.
        folder: where the file is made, if one is needed.
        device: where tensors are wanted.

    Raises:
        HftcoreError: the folder has no room for them.
    """

    def __init__(self, budget: int, folder: Path, device: torch.device):
        super().__init__()
        self.budget, self.folder, self.device = budget, folder, device
        self.used = 0
        self.slots: dict[int, Tensor] = {}
        self.file: IO[bytes] | None = None

    def __getitem__(self, number: int) -> Tensor:
        return super().__getitem__(number).to(self.device)

    def __setitem__(self, number: int, x: Tensor) -> None:
        if number not in self.slots and (number in self or self.used + x.nbytes <= self.budget):
            self.used += 0 if number in self else x.nbytes
            super().__setitem__(number, x.cpu())
            return
        slot = self.slots.get(number)
        # the strides of a copy in memory, on which the order of a sum may depend
        strides = torch.empty_like(x, device="meta").stride()
        if slot is None or (slot.dtype, slot.shape, slot.stride()) != (x.dtype, x.shape, strides):
            slot = self._mapped(x).as_strided(x.shape, strides)
        self.slots[number] = slot.copy_(x)
        super().__setitem__(number, slot)

    def close(self) -> None:
        """Let go of the tensors and their file."""
        self.clear()
        self.slots.clear()
        if self.file is not None:
            self.file.close()

    def _mapped(self, x: Tensor) -> Tensor:
        """Room for `x` in the file, as one axis."""
        content = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(  # noqa: SIM115 (until `close`)
                    dir=self.folder, prefix=".hftcore-activations-"
                )
            start = self.file.seek(0, 2)
            # written and not only reserved: a full disk must fail here, and not where the map is touched
            self.file.write(content)
            self.file.flush()
        except OSError as error:
            raise HftcoreError(
                f"{self.folder} has no room for the hidden states that do not fit into memory ({error}); "
                "calibrate on fewer or shorter samples, or make room there"
            ) from error
        region = np.memmap(self.file, np.uint8, "r+", start, x.nbytes)
        return torch.frombuffer(region, dtype=x.dtype)
