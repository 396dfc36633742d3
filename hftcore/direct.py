"""Read and write large files past the page cache: the disk fills and empties small buffers while the processor does something else.

Through the cache every page is first had from the system, filled by a copy, and given up for the next one; for files that are gone
through once that costs more than the rest of the work.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hftcore.errors import HftcoreError

_C = ctypes.CDLL(None)
PAGE = max(
    4096, mmap.PAGESIZE
)  # what offsets, lengths and addresses must be multiples of; no disk in use asks for more
ROOM = 1 << 22  # bytes collected for the disk; a multiple of PAGE
ADVISED = 1 << 17  # bytes that every system fetches when it is advised to; of more some leave out the rest
STRAIGHT = 1 << 20  # bytes from which on they are not collected but handed on from where they lie, if they lie right


class DirectReader:
    """Reads parts of a file: through the page cache where it holds at least half of one, else past it where the file system allows that.

    What is left of a file that was read or written once is scattered, a gap in almost every part, so to ask for all of it would read
    again nearly all that is there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._cached, self._direct = _open(file, os.O_RDONLY)
        if self._cached != self._direct:
            # no more than is asked for: what the system reads on would be found in the cache next, and so on to the end of the file
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        self._map = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        self._ways: dict[tuple[int, int], int] = {}  # of parts that are read soon

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        for handle in {self._cached, self._direct}:
            os.close(handle)

    def read(self, start: int, stop: int, room: memoryview, then: tuple[int, int] | None = None) -> None:
        """Put bytes `start` to `stop` of the file at `start % PAGE` of `room`, which begins with a page and ends with a spare one.

        Args:
            start, stop, room: as above.
            then: a part that will be read soon; if it goes through the page cache, the system fetches its gaps meanwhile.

        Raises:
            HftcoreError: the file ends before.
        """
        base = start - start % PAGE
        place, handle = start, self._way(start, stop)
        del self._ways[start, stop]  # next time the page cache may hold other parts
        if then is not None:
            self._way(*then)
        while place < stop:
            first = place - place % PAGE
            try:
                got = os.preadv(handle, [room[first - base : -(-stop // PAGE) * PAGE - base]], first)
            except OSError as error:
                # some file systems take the flag and refuse the read
                if error.errno != errno.EINVAL or handle == self._cached:
                    raise
                handle = self._cached
                continue
            if first + got <= place:
                raise HftcoreError(f"{self.file} ended {stop - place} bytes early; was it changed while it was read?")
            place = first + got

    def _way(self, start: int, stop: int) -> int:
        """The handle to read this part by; from the first time that it is asked for, its gaps in the page cache are on their way."""
        if (start, stop) not in self._ways:
            self._ways[start, stop] = self._direct
            if self._direct != self._cached and self._is_held(start, stop):
                self._ways[start, stop] = self._cached
                # all at once, not one after the other as reading comes to them
                for at in range(start, stop, ADVISED):
                    os.posix_fadvise(self._cached, at, min(ADVISED, stop - at), os.POSIX_FADV_WILLNEED)
        return self._ways[start, stop]

    def _is_held(self, start: int, stop: int) -> bool:
        """Whether half of this is in the page cache; to ask by reading without waiting would begin to read it into the cache."""
        first = start - start % PAGE
        pages = np.zeros(-(-(stop - first) // PAGE), np.uint8)
        if stop > self._map.size:
            return True
        refused = _C.mincore(
            ctypes.c_void_p(self._map.ctypes.data + first), ctypes.c_size_t(stop - first), pages.ctypes
        )
        return not refused and 2 * int((pages & 1).sum()) >= len(pages)


class DirectWriter:
    """Writes runs of bytes into a file that exists; where the file system knows no direct access, through the page cache.

    Bytes that follow each other make one run, whatever the pieces they come in. Only the broken pages at the two ends of a run go
    through the cache, so that several runs, and several writers of one file, may meet inside a page.
    """

    def __init__(self, file: Path) -> None:
        self._cached, self._direct = _open(file, os.O_WRONLY)
        # it begins with a page of the file, and being mapped with one of memory
        self._room = torch.frombuffer(mmap.mmap(-1, ROOM), dtype=torch.uint8)
        # of the bytes of the file that wait there
        self._start = self._stop = 0

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
        if len(data) >= STRAIGHT and (data.data_ptr() - offset) % PAGE == 0:
            data = self._write_straight(data)
        while len(data):
            at = self._start % PAGE + self._stop - self._start
            part = data[: ROOM - at]
            self._room[at : at + len(part)].copy_(part)
            self._stop += len(part)
            data = data[len(part) :]
            if at + len(part) == ROOM:
                self.flush()

    def _write_straight(self, data: Tensor) -> Tensor:
        """Write the whole pages of what lies in memory as it will in the file, after what waits; returns what is left."""
        head = -self._stop % PAGE
        self.write(self._stop, data[:head])
        self.flush()
        whole = (len(data) - head) // PAGE * PAGE
        self._put(self._direct, data[head : head + whole].numpy().data, self._stop)
        self._start = self._stop = self._stop + whole
        return data[head + whole :]

    def flush(self) -> None:
        """Write what waits."""
        base = self._start - self._start % PAGE
        room = self._room.numpy().data[: self._stop - base]
        first, last = -(-self._start // PAGE) * PAGE, self._stop // PAGE * PAGE
        if first < last:
            self._put(self._cached, room[self._start - base : first - base], self._start)
            self._put(self._direct, room[first - base : last - base], first)
            self._put(self._cached, room[last - base :], last)
        else:
            self._put(self._cached, room[self._start - base :], self._start)
        self._start = self._stop

    def _put(self, handle: int, data: memoryview, start: int) -> None:
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


def _open(file: Path, flags: int) -> tuple[int, int]:
    """Handles through the page cache and past it; twice the same where that is not possible."""
    cached = os.open(file, flags)
    try:
        return cached, os.open(file, flags | os.O_DIRECT) if hasattr(os, "O_DIRECT") else cached
    except OSError as error:
        if error.errno != errno.EINVAL:
            os.close(cached)
            raise
        return cached, cached
