"""Peak memory of one call above what was in use before it."""

import ctypes
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needed at its peak above the start, its result included; None where the system does not tell.

    On a GPU the caching allocator's peak; on the CPU the process's resident set: the kernel's high-water mark, reset just before,
    or where that is not allowed the highest of samples taken every half millisecond.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
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
