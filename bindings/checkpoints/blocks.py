"""Files in a few blocks of memory, each used again once nothing needs what it holds."""

import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.direct import PAGE, DirectReader

# bytes read at a time: what is read, ranked, hashed and written soon after each other stays in the cache of the processor
BLOCK = 1 << 23


class Blocks:
    """Memory for what is read: `count` blocks, at least 2, or one alone where it must be larger than a block.

    Fresh memory for every block would cost more than reading it: the system clears each page before it is given out.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[mmap.mmap] = []
        self._lent: deque[tuple[mmap.mmap, list[Future[Any]]]] = deque()
        self._current: list[Future[Any]] = []

    def read(self, file: Path, spans: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """[stop - start] uint8 for each of the spans of a file, the next one being read meanwhile.

        A tensor may be used until the next one is asked for, and by its `jobs` until they are done.

        Raises:
            HftcoreError: the file ends before.
        """
        coming: deque[tuple[Future[None], mmap.mmap, int, int, list[Future[Any]]]] = deque()
        with DirectReader(file) as source, ThreadPoolExecutor(1) as reader:
            for start, stop in spans:
                # where a block is larger than it should be, it is the only one
                while coming and (len(coming) > 1 or max(stop - start, coming[-1][3] - coming[-1][2]) > BLOCK):
                    yield self._arrived(*coming.popleft())
                room, jobs = self._take(stop - start)
                coming.append((reader.submit(source.read, start, stop, memoryview(room)), room, start, stop, jobs))
            while coming:
                yield self._arrived(*coming.popleft())

    def jobs(self, *jobs: Future[Any]) -> None:
        """The block read last is needed until these are done."""
        self._current.extend(jobs)

    def settle(self) -> None:
        """Wait for all jobs; what one of them raised is raised here, if `read` has not done so."""
        while self._lent:
            self._return()

    def _arrived(self, read: Future[None], room: mmap.mmap, start: int, stop: int, jobs: list[Future[Any]]) -> Tensor:
        read.result()
        self._current = jobs
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(room, dtype=torch.uint8, count=stop - start, offset=start % PAGE)

    def _take(self, size: int) -> tuple[mmap.mmap, list[Future[Any]]]:
        while self._lent and sum(len(room) for room, _ in self._lent) + max(size, BLOCK) > self._count * (
            BLOCK + 2 * PAGE
        ):
            self._return()
        room = self._free.pop() if size <= BLOCK and self._free else mmap.mmap(-1, max(size, BLOCK) + 2 * PAGE)
        self._lent.append((room, []))
        return self._lent[-1]

    def _return(self) -> None:
        room, jobs = self._lent.popleft()
        for job in jobs:
            job.result()
        if len(room) == BLOCK + 2 * PAGE:
            self._free.append(room)


def bytes_of(file: Path, start: int, stop: int, memory: Blocks) -> Iterator[Tensor]:
    """Bytes `start` to `stop` of a file, a block at a time; one empty block if there are none."""
    return memory.read(file, [(at, min(stop, at + BLOCK)) for at in range(start, max(stop, start + 1), BLOCK)])


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
    starts = range(0, max(1, piece.rows), step)
    spans = [(piece.start + row * row_bytes, piece.start + min(row + step, piece.rows) * row_bytes) for row in starts]
    for row, raw in zip(starts, memory.read(piece.file, spans), strict=True):
        rows = min(step, piece.rows - row)
        yield row, raw.view(piece.dtype).view((piece.columns, rows) if piece.transposed else (rows, piece.columns))
