"""Results: JSON Lines, one measurement a line, with the machine, the versions and the commit it came from."""

import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hftcore.backend import why_not

PACKAGES = ("hftcore", "torch", "triton", "transformers")
RUN = "hftcore-bench run"  # its own duration, a line like others
QUICKLY, WHOLLY = "--quick", "everything"


@dataclass(frozen=True)
class Measurement:
    """One variant of one case at one shape and dtype.

    Fields:
        size: as of `job.shape_of`.
        kind: "ours", "peer", "ceiling"; or "missing", what could not run, for the `reason`, and "counted", which have no times.
        times_ms: by round; round i of all variants of a case ran together.
        bytes_moved, products: what an ideal kernel moves and multiplies for this case, or None.
        extra_bytes: peak memory above the start, or None where it is not known.
        canary: slowdown of a fixed computation timed along, 1 where none was; neighbours: cores other processes kept busy, or None.
        instructions: for each element of the input, of what is "counted".
    """

    case: str
    shape: str
    size: list[int]
    dtype: str
    device: str
    backend: str
    threads: int
    variant: str
    kind: str
    times_ms: list[float]
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    bytes_moved: int | None
    products: int | None
    extra_bytes: int | None
    canary: float
    neighbours: float | None
    noisy: bool
    reason: str | None = None
    instructions: float | None = None


def append(path: Path, measurements: Iterable[Measurement], facts: dict[str, Any]) -> None:
    """Add whole lines to a result file, which is made if need be.

    Args:
        facts: what `run_facts` gave.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(one) | facts) + "\n" for one in measurements))


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file; of several runs of the same case, shape and dtype the last, so that rounds of two runs make no ratio.

    Raises:
        ValueError: a line is not a measurement, or the lines are of several machines, whose times make no ratios.
    """
    newest: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            one = json.loads(line)
            if "size" not in one:  # as files were written before shapes could have more than two sizes
                one["size"] = [one.pop("rows"), one.pop("columns")]
            where, kind = tuple(str(one[key]) for key in ("case", "shape", "dtype")), one["kind"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path.name} is not a measurement of hftcore-bench: {error}") from None
        # every run of a case begins with our own line, and a count is all of its run
        newest[where] = [one] if kind in ("ours", "counted") else [*newest.get(where, []), one]
    lines = [one for run in newest.values() for one in run]
    machines = {json.dumps(one.get("machine"), sort_keys=True) for one in lines}
    if len(machines) > 1:
        raise ValueError(f"{path.name} holds results of {len(machines)} machines; keep one file for each")
    return lines


def require_same_machine(path: Path, facts: dict[str, Any]) -> None:
    """Refuse, before anything is measured, to add to a file of another machine; a file that is not there yet is fine.

    Raises:
        ValueError: as `load`; or the file's machine is not that of `facts`.
    """
    for line in load(path)[:1] if path.exists() else ():
        if line.get("machine") != facts["machine"]:
            raise ValueError(f"{path.name} holds results of another machine than this; choose another file with --out")


def run_facts(device: torch.device) -> dict[str, Any]:
    """Where and with what a run takes place; no host names and no paths."""
    return {
        "machine": machine(device),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """CPU model, usable cores and the native backend's instruction set; the GPU's name and driver's CUDA version if it is one."""
    facts: dict[str, Any] = {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "simd": _simd()}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip}
    return facts


def file_stem(facts: dict[str, Any]) -> str:
    """A short file name for a machine.

    >>> file_stem({"machine": {"cpu": "AMD EPYC 9654 96-Core Processor"}})
    'cpu-amd-epyc-9654'
    """
    here = facts["machine"]
    name = here.get("gpu") or re.sub(r"\d+-core.*|\bprocessor\b.*|\(.*?\)|@.*", "", here["cpu"], flags=re.IGNORECASE)
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return short if "gpu" in here else f"cpu-{short}"


def commit() -> str | None:
    """The commit of the checkout this file lies in, with "-dirty" where tracked files differ; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else "unknown"


def _simd() -> str | None:
    if why_not("native", "cpu") is not None:
        return None
    from hftcore.kernels import native

    return native.simd()
