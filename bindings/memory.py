"""How much memory there is to work in."""

import os
import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be used on a device; on the CPU no more than the limit of this container leaves.

    Where the system does not say what is free (other than Linux), all of the machine's memory.

    >>> available_memory(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = int(re.findall(r"MemAvailable:\s+(\d+)", MEMINFO.read_text())[0]) * 1024
    except (OSError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((GROUP / "memory.max").read_text())
        used = int((GROUP / "memory.current").read_text())
        held = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no such group, or one without a limit ("max")
    # what only caches files makes room when it is needed
    return max(0, min(free, limit - used + int(held.get("file", 0))))
