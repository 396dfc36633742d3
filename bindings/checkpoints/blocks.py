"""Files in a few blocks of memory, each used again once nothing needs what it holds."""

import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, tee, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.checkpoints.pieces import Piece
from hftcore.direct import PAGE, DirectReader

# bytes read at a time: what is read, ranked, hashed and written soon after each other stays in the cache of the processor
BLOCK = 1 << 22
AHEAD = 2  # how many blocks of the same file before a block is read what the page cache lacks of it is asked for

Span = tuple[Path, int, int]  # bytes [start, stop) of a file


class Blocks:
    """Memory for what is read: `count` blocks, at least 2, or one alone where it must be larger than a block.

    Fresh memory for every block would cost more than reading it: the system clears each page before it is given out.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[mmap.mmap] = []
        self._lent: deque[tuple[mmap.mmap, list[Future[Any]]]] = deque()
        self._current: list[Future[Any]] = []

    def read(self, spans: Iterable[Span]) -> Iterator[Tensor]:
        """[stop - start] uint8 for each of the spans, the next one being read meanwhile.

        A tensor may be used until the next one is asked for, and by its `jobs` until they are done.

        Raises:
            HftcoreError: a file ends before.
        """
        coming: deque[tuple[Future[None], mmap.mmap, int, int, list[Future[Any]]]] = deque()
        source: DirectReader | None = None
        with ThreadPoolExecutor(1) as reader:
            try:
                now, later = tee(spans)
                for (file, start, stop), soon in zip_longest(now, islice(later, AHEAD, None)):
                    # where a block is larger than it should be, it is the only one
                    while coming and (len(coming) > 1 or max(stop - start, coming[-1][3] - coming[-1][2]) > BLOCK):
                        yield self._arrived(*coming.popleft())
                    room, jobs = self._take(stop - start)
                    if source is not None and source.file != file:
                        # after what it has been asked for, as this thread does one thing after the other
                        reader.submit(source.close)
                        source = None
                    source = source or DirectReader(file)
                    then = soon[1:] if soon and soon[0] == file else None
                    read = reader.submit(source.read, start, stop, memoryview(room), then)
                    coming.append((read, room, start, stop, jobs))
                while coming:
                    yield self._arrived(*coming.popleft())
            finally:
                if source is not None:
                    reader.submit(source.close)

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


def spans_of(file: Path, start: int, stop: int) -> list[Span]:
    """Bytes `start` to `stop` of a file in blocks; one that is empty if there are none."""
    return [(file, at, min(stop, at + BLOCK)) for at in range(start, max(stop, start + 1), BLOCK)]


@dataclass(frozen=True)
class Rows:
    """Some rows of a piece, or some columns of one that is stored transposed: `count` stored rows from number `first` on."""

    piece: Piece
    first: int
    count: int

    @property
    def span(self) -> Span:
        row_bytes = self._width * self.piece.dtype.itemsize
        start = self.piece.start + self.first * row_bytes
        return self.piece.file, start, start + self.count * row_bytes

    @property
    def columns(self) -> slice:
        """Which columns of the piece they are of."""
        return slice(self.first, self.first + self.count) if self.piece.transposed else slice(None)

    @property
    def _width(self) -> int:
        return self.piece.rows if self.piece.transposed else self.piece.columns

    def of(self, raw: Tensor) -> Tensor:
        """[rows, columns]: the bytes of the span, in [out, in] orientation."""
        stored = raw.view(self.piece.dtype).view(self.count, self._width)
        return stored.t() if self.piece.transposed else stored


def rows_of(piece: Piece, row_step: int = 1) -> list[Rows]:
    """A piece in blocks, of which one at least is given even if it is empty; a transposed piece comes whole.

    Args:
        piece: to be read.
        row_step: a block has a multiple of so many rows.
    """
    if piece.transposed:
        return [Rows(piece, 0, piece.columns)]
    step = max(1, BLOCK // max(1, piece.columns * piece.dtype.itemsize) // row_step) * row_step
    return [Rows(piece, row, min(step, piece.rows - row)) for row in range(0, max(1, piece.rows), step)]
