"""Pruning a checkpoint on its files, against a plain copy of them."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hftcore.bench.job import Job, UnavailableError
from hftcore.bench.models import model_of
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.files import sync
from hftcore.layers import find_layers
from hftcore.pattern import Pattern

COPY = "one plain copy"
MOST = {"row": 1.3, "model": 2.2}  # times a plain copy, by scope


def streaming_job(scope: Any) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares pruning half of the weights, with the Edit and the manifest, from files that the page cache does not hold.

    All of it is on the disk at the end, as the copy is."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        if device.type != "cpu":
            raise UnavailableError("files are pruned on the CPU")
        place = tempfile.TemporaryDirectory()
        source, out, copy = (Path(place.name) / name for name in ("model", "out", "copy"))
        model = model_of(shape, dtype, device)
        model.save_pretrained(source, max_shard_size="1GB")
        for file in source.iterdir():
            sync(file)
        draw = torch.Generator().manual_seed(0)
        energy = Energy(
            {layer.name: torch.rand(layer.weight.shape[-1], generator=draw) for layer in find_layers(model)},
            tokens=1,
            samples=1,
        )

        def plain_copy() -> None:
            shutil.copytree(source, copy)
            for file in copy.iterdir():
                sync(file)

        def restore() -> None:
            for folder in (out, copy):
                shutil.rmtree(folder, ignore_errors=True)
            for file in source.iterdir():
                _forget(file)

        return Job(
            lambda: prune_folder(source, energy, Pattern("50%", scope=scope), out),
            {},
            restore,
            agrees=lambda mine, theirs: True,
            answer=lambda edit: edit,
            check=_check_share,
            ceilings={COPY: plain_copy},
            rounds=5,
            is_long=shape != "tiny-llama",
            close=place.cleanup,
        )

    return prepare


def _forget(file: Path) -> None:
    """Let the page cache give up a file that is on the disk: a checkpoint larger than memory is not in it either."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_share(edit: Edit) -> None:
    if abs(edit.sparsity - 0.5) > 0.01:
        raise ValueError(f"{100 * edit.sparsity:.1f} % of the weights were removed, not half")
