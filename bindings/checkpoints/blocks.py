"""Files in a few blocks of memory, each used again once nothing needs what it holds."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.errors import HftcoreError

# bytes read at a time: what is read, ranked, hashed and written soon after each other stays in the cache of the processor
BLOCK = 1 << 23


class Blocks:
    """Memory for what is read: `count` blocks, or one alone where it must be larger than a block.

    Fresh memory for every block would cost more than reading it: the system clears each page before it is given out.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[Tensor] = []
        self._lent: deque[tuple[Tensor, list[Future[Any]]]] = deque()

    def read(self, file: Path, handle: int, start: int, stop: int) -> Tensor:
        """[stop - start] uint8: those bytes of a file. They stay until as many more blocks are read and their `jobs` are done.

        Raises:
            HftcoreError: the file ends before `stop`.
        """
        block = self._take(stop - start)
        room = block.numpy().data
        while room:
            got = os.preadv(handle, [room], start)
            if not got:
                raise HftcoreError(f"{file} ended {len(room)} bytes early; was it changed while it was read?")
            room, start = room[got:], start + got
        return block

    def jobs(self, *jobs: Future[Any]) -> None:
        """The block read last is needed until these are done."""
        self._lent[-1][1].extend(jobs)

    def settle(self) -> None:
        """Wait for all jobs; what one of them raised is raised here, if `read` has not done so."""
        while self._lent:
            self._return()

    def _take(self, size: int) -> Tensor:
        while self._lent and sum(len(block) for block, _ in self._lent) + max(size, BLOCK) > self._count * BLOCK:
            self._return()
        is_ready = size <= BLOCK and self._free
        block = self._free.pop() if is_ready else torch.empty(max(size, BLOCK), dtype=torch.uint8)
        self._lent.append((block, []))
        return block[:size]

    def _return(self) -> None:
        block, jobs = self._lent.popleft()
        for job in jobs:
            job.result()
        if len(block) == BLOCK:
            self._free.append(block)


def bytes_of(file: Path, start: int, stop: int, memory: Blocks) -> Iterator[Tensor]:
    """Bytes `start` to `stop` of a file, a block at a time; one empty block if there are none."""
    with file.open("rb") as content:
        for first in range(start, max(stop, start + 1), BLOCK):
            yield memory.read(file, content.fileno(), first, min(stop, first + BLOCK))


def rows_of(piece: Piece, memory: Blocks, row_step: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Copies of a piece's rows as they lie in the file, with the number of the first; a transposed piece comes whole.

    Args:
        piece: at least one block is given of it, even if it is empty.
        memory: holds the copies.
        row_step: a block has a multiple of so many rows.
    """
    row_bytes = piece.columns * piece.dtype.itemsize
    step = max(1, BLOCK // max(1, row_bytes) // row_step) * row_step
    if piece.transposed:
        step = max(1, piece.rows)
    with piece.file.open("rb") as content:
        for row in range(0, max(1, piece.rows), step):
            rows = min(step, piece.rows - row)
            start = piece.start + row * row_bytes
            raw = memory.read(piece.file, content.fileno(), start, start + rows * row_bytes)
            yield row, raw.view(piece.dtype).view((piece.columns, rows) if piece.transposed else (rows, piece.columns))
