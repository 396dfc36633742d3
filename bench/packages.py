"""Peers that are packages: each in an environment of its own, whose process computes on the same saved inputs.

An environment shares the packages of the one that makes it, torch above all, so that both run the same build; it holds only what the peer
needs beside them, or in other versions.
"""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import Tensor

from hftcore.bench import tree
from hftcore.bench.worker import Remote, Worker
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Package:
    """A peer to install.

    Fields:
        requirement: for pip.
        imports: proves that it works.
    """

    requirement: str
    imports: str


PACKAGES = {
    "opacus": Package("opacus==1.6.0", "opacus"),
    "llmcompressor": Package("llmcompressor>=0.7", "llmcompressor"),
}
# what nobody installs by a command of ours, and why
LEFT_OUT = {
    "safetune": "not compared: its licence (LSAL 1.2, section 1A) has organizations ask its authors before they benchmark with it; "
    "it would also need Python 3.12 and a PyTorch of its own",
}
OPACUS = {"Opacus ghost clipping": "ghost", "Opacus fast gradient clipping": "fast", "Opacus hooks": "hooks"}


def folder() -> Path:
    """Where the environments lie: `.cache/peers` of the checkout, else of the working directory."""
    root = tree.here()["hftcore.bench"].parent
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / ".cache" / "peers"


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, there or not."""
    return folder() / name / "bin" / "python"


def why_not(name: str) -> str | None:
    """Why a package cannot be compared with; None if it can."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    reason = folder() / name / "reason"
    if reason.is_file():
        return reason.read_text(encoding="utf-8").strip()
    return None if python_of(name).exists() else "not installed; run hftcore-bench peers --install"


def install(name: str, say: Callable[[str], None]) -> bool:
    """Make a package's environment anew; where that fails, the reason is kept beside it and shown in reports.

    Returns:
        whether it can be used.

    Raises:
        HftcoreError: no package of this name, or one that is left out.
    """
    if name in LEFT_OUT:
        raise HftcoreError(f"{name}: {LEFT_OUT[name]}")
    if name not in PACKAGES:
        raise HftcoreError(f"a peer must be one of {', '.join(PACKAGES)}, got {name!r}")
    place = folder() / name
    say(f"{name}: making {place.relative_to(folder().parent.parent)}")
    venv.create(place, clear=True, with_pip=True)
    libraries = next((place / "lib").glob("python*/site-packages"))
    # read after the environment's own packages, so that these win
    (libraries / "shared.pth").write_text(
        "\n".join(entry for entry in sys.path if entry.endswith("site-packages")) + "\n"
    )
    package = PACKAGES[name]
    pip: list[str | Path] = [
        python_of(name),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        package.requirement,
    ]
    check: list[str | Path] = [python_of(name), "-c", f"import {package.imports}"]
    for command in (pip, check):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            (place / "reason").write_text(f"it could not be installed: {said}\n", encoding="utf-8")
            say(f"{name}: {why_not(name)}")
            return False
    say(f"{name}: ready")
    return True


@contextmanager
def started(name: str, module: str, inputs: Path) -> Iterator[Worker]:
    """A process of a peer's environment that runs one of our modules on saved inputs."""
    with tempfile.TemporaryDirectory() as scratch:
        path = tree.link(Path(scratch), tree.here())
        command: list[str | Path] = [python_of(name), "-P", "-m", f"hftcore.bench.{module}", inputs]
        worker = Worker(command, {"PYTHONPATH": str(path)})
        try:
            yield worker
        finally:
            worker.close()


def nothing() -> None:
    """For jobs that have nothing to end."""


Peers = tuple[dict[str, Callable[[], Any]], dict[str, str], Callable[[], None]]


def opacus_peers(model: "PreTrainedModel", ids: Tensor) -> Peers:
    """Opacus' three ways to the per-sample norms of a transformers model.

    Returns:
        (the peers, why those that cannot run cannot, what ends their process).
    """
    return _peers("opacus", OPACUS, model, ids)


def llmcompressor_peers(model: "PreTrainedModel", ids: Tensor) -> Peers:
    """llm-compressor's Wanda, 50 % of every row, block by block; as `opacus_peers`."""
    return _peers("llmcompressor", {"llm-compressor Wanda": ""}, model, ids)


def safetune_peers(_model: "PreTrainedModel", _ids: Tensor) -> Peers:
    """SafeTune's Antidote, which is left out; as `opacus_peers`."""
    return {}, {"SafeTune's Antidote": LEFT_OUT["safetune"]}, nothing


def _peers(name: str, ways: dict[str, str], model: "PreTrainedModel", ids: Tensor) -> Peers:
    reason = why_not(name)
    if reason is None and ids.device.type != "cpu":
        reason = "packages in environments of their own are compared on the CPU only"
    if reason is not None:
        return {}, dict.fromkeys(ways, reason), nothing
    stack = ExitStack()

    @cache
    def start() -> Worker:
        inputs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # as model.save_pretrained does, but without its progress bar
        model.config.save_pretrained(inputs)
        save_model(model, str(inputs / "model.safetensors"), metadata={"format": "pt"})
        torch.save({"ids": ids}, inputs / "inputs.pt")
        return stack.enter_context(started(name, f"{name}_process", inputs))

    return {title: Remote(start, title, way=way) for title, way in ways.items()}, {}, stack.close
