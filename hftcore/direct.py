"""Write large files past the page cache: the disk takes whole pages out of one small buffer while the processor does something else.

Through the cache every written page is first had from the system, filled by a copy, and flushed when the file is synced; for files
that are written once and not read soon that costs more than the rest of the work.
"""

import errno
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

PAGE = max(
    4096, mmap.PAGESIZE
)  # what offsets, lengths and addresses must be multiples of; no disk in use asks for more
ROOM = 1 << 22  # bytes handed to the disk at a time; a multiple of PAGE


class DirectWriter:
    """Writes runs of bytes into a file that exists; where the file system knows no direct access, through the page cache.

    Bytes that follow each other make one run, whatever the pieces they come in. Only the broken pages at the two ends of a run go
    through the cache, so that several runs, and several writers of one file, may meet inside a page.
    """

    def __init__(self, file: Path) -> None:
        self._cached = os.open(file, os.O_WRONLY)
        self._direct = self._cached
        try:
            self._direct = os.open(file, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self._cached)
                raise
        # mapped memory begins with a page
        self._room = torch.frombuffer(mmap.mmap(-1, ROOM), dtype=torch.uint8)
        self._start = self._stop = (
            0  # of the bytes of the file that wait in the room, which begins with a page of the file too
        )

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what waits is not written."""
        for handle in {self._cached, self._direct}:
            os.close(handle)

    def write(self, offset: int, data: Tensor) -> None:
        """Put `data`, [n] uint8, at byte `offset` of the file. It is with the system after `flush`, and on the disk after a sync."""
        if offset != self._stop:
            self.flush()
            self._start = self._stop = offset
        while len(data):
            at = self._start % PAGE + self._stop - self._start
            part = data[: ROOM - at]
            self._room[at : at + len(part)].copy_(part)
            self._stop += len(part)
            data = data[len(part) :]
            if at + len(part) == ROOM:
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        first, last = -(-self._start // PAGE) * PAGE, self._stop // PAGE * PAGE
        if first < last:
            self._put(self._cached, self._start, first)
            self._put(self._direct, first, last)
            self._put(self._cached, last, self._stop)
        else:
            self._put(self._cached, self._start, self._stop)
        self._start = self._stop

    def _put(self, handle: int, start: int, stop: int) -> None:
        base = self._start - self._start % PAGE
        data = self._room.numpy().data[start - base : stop - base]
        while data:
            try:
                written = os.pwrite(handle, data, start)
            except OSError as error:
                # some file systems take the flag and refuse the write
                if error.errno != errno.EINVAL or handle == self._cached:
                    raise
                handle = self._cached
                continue
            data, start = data[written:], start + written
