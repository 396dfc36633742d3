"""What this machine can run, what is missing, and what to do about it."""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from hftcore.backend import BACKENDS, backend_for, why_not
from hftcore.errors import HftcoreError

PACKAGES = {
    "hftcore": None,
    "torch": None,
    "triton": "pip install triton: the GPU kernels (Linux)",
    "numpy": None,
    "safetensors": None,
    "transformers": "pip install transformers: models",
    "accelerate": "pip install accelerate: training and GGUF files",
    "huggingface_hub": None,
    "typer": None,
    "peft": 'pip install "hftcore[peft]": LoRA adapters',
    "gguf": 'pip install "hftcore[gguf]": the embedded model of the demo',
    "matplotlib": 'pip install "hftcore[plots]": plots',
}


def examine() -> dict[str, Any]:
    """Facts about this machine, as JSON values.

    Returns:
        `python`, `platform`; `packages` name -> version or None; `devices` a list; `backends` name -> {device -> None,
        or why it does not serve that device}; `chosen` device -> backend; `simd` the native backend's instructions or
        None; `shares_threads` whether it runs on PyTorch's threads, or None; `backend_variable`; `embedded_model` whether
        the demo's model is here; `advice` a list of sentences.

    >>> sorted(examine()["backends"])
    ['native', 'torch', 'triton']
    """
    devices = _devices()
    kinds = list(dict.fromkeys(device["kind"] for device in devices))
    packages = {name: _version(name) for name in PACKAGES}
    chosen: dict[str, str | None] = {}
    problems: list[str] = []
    for kind in kinds:
        try:
            chosen[kind] = backend_for(kind)
        except HftcoreError as error:
            chosen[kind] = None
            problems.append(str(error))
    embedded = _embedded()
    advice = [remedy for name, remedy in PACKAGES.items() if packages[name] is None and remedy]
    if not embedded["present"]:
        advice.append(f"{embedded['remedy']}: the embedded model of the demo")
    if (reason := why_not("native", "cpu")) is not None:
        advice.append(f"install a C++ compiler, then hftcore again: the native CPU kernels are missing ({reason})")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "backends": {name: {kind: why_not(name, kind) for kind in kinds} for name in BACKENDS},
        "chosen": chosen,
        "simd": _simd(),
        "shares_threads": _shares_threads(),
        "backend_variable": os.environ.get("HFTCORE_BACKEND") or None,
        "embedded_model": embedded["present"],
        "advice": problems + advice,
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for people."""
    lines = [f"Python {report['python']} on {report['platform']}", "", "Devices"]
    for device in report["devices"]:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("kind", "name"))
        lines.append(
            f"  {device['kind']}: {device['name']} ({facts}); backend {report['chosen'][device['kind']] or 'none'}"
        )
    lines += ["", "Backends"]
    for name, reasons in report["backends"].items():
        for kind, reason in reasons.items():
            lines.append(f"  {name} on {kind}: {'available' if reason is None else f'no: {reason}'}")
    threads = {True: "; PyTorch's threads", False: "; threads of its own, as PyTorch's are not GNU OpenMP's", None: ""}
    lines.append(
        f"  instruction set of the native backend: {report['simd'] or 'none'}{threads[report['shares_threads']]}"
    )
    if report["backend_variable"]:
        lines.append(f"  HFTCORE_BACKEND={report['backend_variable']}")
    lines += ["", "Packages"]
    lines += [f"  {name} {version or '(not installed)'}" for name, version in report["packages"].items()]
    lines += ["", f"Embedded model: {'present' if report['embedded_model'] else 'not installed'}", ""]
    if not report["advice"]:
        return "\n".join([*lines, "Nothing is missing."])
    return "\n".join([*lines, "What to do", *(f"  {sentence}" for sentence in report["advice"])])


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"kind": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        devices.append({"kind": "cuda", "name": facts.name, "index": index, "memory": memory})
    return devices


def _cpu_name() -> str:
    """The processor's name, or only its architecture where the system does not tell (it does on Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _simd() -> str | None:
    if why_not("native", "cpu") is not None:
        return None
    native = importlib.import_module("hftcore.kernels.native")
    return native.simd()


def _shares_threads() -> bool | None:
    return None if _simd() is None else importlib.import_module("hftcore.kernels.native").shares_threads()


def _embedded() -> dict[str, Any]:
    from hftcore.bindings import embedded

    return {"present": embedded.is_available(), "remedy": embedded.INSTALL}
