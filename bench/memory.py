"""Peak memory of one call above what was in use before it."""

import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_OPTIONS = (-1, -3, -4)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of malloc.h
HELD = (2**30, 2**25, 0)  # all that is freed is kept
USUAL = (2**26, 2**25, 2**16)  # what glibc comes to by itself where much is freed
RETURNED = (2**17, 2**17, 2**16)  # pieces of 128 KiB and more are the system's again at once
_now = USUAL


@contextmanager
def freed_memory(values: tuple[int, int, int]) -> Iterator[None]:
    """What the C library does with freed memory inside the block: HELD, USUAL or RETURNED. Nothing happens where it is not glibc.

    By itself it returns large pieces and the top of the heap to the system, to be taken anew page by page. That is a tenth and more of
    a training step, and where two models are in a process it depends on which of them works at the top.
    """
    before = _now
    _tell_malloc(values)
    try:
        yield
    finally:
        _tell_malloc(before)


def _tell_malloc(values: tuple[int, int, int]) -> None:
    global _now
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        _now = values
        for option, value in zip(_OPTIONS, values, strict=True):
            mallopt(option, value)


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needed at its peak above the start, its result included; None where the system does not tell.

    On a GPU the caching allocator's peak; on the CPU the process's resident set: the kernel's high-water mark, reset just before,
    or where that is not allowed the highest of samples taken every half millisecond. Meanwhile freed memory is returned at once: what the
    C library would keep of it depends on what was there before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with freed_memory(RETURNED):
        return _resident(call)


def _resident(call: Callable[[], object]) -> int | None:
    _return_free_memory()
    if not _STATUS.exists():
        call()
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled(call)
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _return_free_memory() -> None:
    # memory that malloc kept from an earlier call would hide what this call takes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sampled(call: Callable[[], object]) -> int:
    before = highest = _status("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, _status("VmRSS"))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0, max(highest, _status("VmRSS")) - before)
