"""Models and adapters: from a folder or the hub into memory, and back to a folder."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftcore.bindings.checkpoints.edits import names_on_disk
from hftcore.bindings.checkpoints.manifest import EDIT, describe, describe_edit, write_manifest
from hftcore.bindings.checkpoints.stored import DTYPES, list_tensors
from hftcore.bindings.output import check_output
from hftcore.errors import HftcoreError
from hftcore.files import whole_folder

ADAPTER = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# no pickles and no code
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_OTHER = ["original/*", "consolidated*", "onnx/*"]


def load_model(
    path: str | Path, device: str | None = None, dtype: str = "auto", base: str | None = None
) -> tuple[Any, Any]:
    """A causal model, in eval mode, and its tokenizer.

    Args:
        path: a checkpoint folder, a PEFT adapter folder (its base model is loaded too), or a hub id of either.
        device: "cpu", "cuda", "cuda:1", …; None takes the first GPU if there is one.
        dtype: "auto" for that of the files, "float32", "bfloat16" or "float16".
        base: for an adapter, the folder or hub id of its base model, in place of the one its config names.

    Returns:
        (model, tokenizer): a `PreTrainedModel`, or a `PeftModel` for an adapter, whose weights are not merged.

    Raises:
        HftcoreError: no such folder or hub model, no tokenizer, a damaged checkpoint, an unknown device or dtype, or
            peft is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise HftcoreError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    place = find_device(device)
    quiet()
    folder = find_folder(path)
    adapter = is_adapter(folder)
    if base is not None and not adapter:
        raise HftcoreError(f"base is for adapter folders; {path} has no {ADAPTER}: leave base out")
    body = find_base(folder, base) if adapter else folder
    tokenizer = load_tokenizer([folder, body])
    list_tensors(body)  # refuses what transformers would unpickle, or read in spite of damage
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model, unknown = load_whole(
        body,
        lambda: AutoModelForCausalLM.from_pretrained(
            body,
            dtype=kind,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        ),
    )
    if unknown:
        warnings.warn(
            f"{body} holds tensors that the model has not ({len(unknown)}), such as {min(unknown)!r}", stacklevel=2
        )
    if adapter:
        model = with_adapter(model, folder)
    return model.to(place).eval(), tokenizer


def save_model(
    model: Any, tokenizer: Any, out: str | Path, sources: tuple[str | Path, ...] = (), edit: Any = None
) -> Path:
    """Write a model or adapter, its tokenizer and, in `edit/`, the Edit that led to it, with a manifest that `hftcore verify` reads. `out`
    is complete or absent.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel`, of which only the adapter is written.
        tokenizer: written beside it; None for none.
        out: the folder to make; it must not exist, or be empty.
        sources: folders `out` must not lie in.
        edit: an `hftcore.Edit`, or None.

    Returns:
        The absolute path of `out`.

    Raises:
        HftcoreError: `out` is taken, or the edit changes weights that an adapter folder does not hold.
        OSError: the disk is full.
    """
    target = check_output(out, sources)
    if edit is not None and hasattr(model, "peft_config"):
        refuse_base_weights(edit.tensors)
    quiet()
    with whole_folder(target) as work:
        model.save_pretrained(work, **_adapter_options(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if edit is not None:
            files = {file.relative_to(work).as_posix(): describe(file) for file in work.rglob("*") if file.is_file()}
            edit.save(work / EDIT)
            write_manifest(work, files | describe_edit(work), EDIT)
    return target


def _adapter_options(model: Any) -> dict[str, Any]:
    """What else PEFT must be told to save an adapter as it is.

    Left alone it looks on the hub, adapter by adapter, whether the vocabulary of the base model has grown, which nothing here does, and
    where it has since, writes embeddings that the adapter never had. Embeddings with factors of their own are its to save.
    """
    if not hasattr(model, "peft_config"):
        return {}
    tuned = any(hasattr(layer, "base_layer") for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return {} if tuned else {"save_embedding_layers": False}


def merged(model: Any) -> Any:
    """The plain model an adapter makes of its base model, whose memory it takes over; any other model as it is."""
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


def refuse_base_weights(names: Iterable[str]) -> None:
    """Refuse to change, of a model with an adapter, any parameter that is no LoRA factor.

    Raises:
        HftcoreError: one of `names` is of the base model, which an adapter folder does not hold.
    """
    outside = [name for name in names if ".lora_" not in name]
    if outside:
        raise HftcoreError(
            f"this would change base weights ({outside[0]}), which an adapter folder does not hold: choose targets 'lora', "
            "keep the Edit alone (--edit-only), or merge the adapter into its base model first"
        )


def is_adapter(path: str | Path, name: str = "MODEL") -> bool:
    """Whether a folder or hub id, which errors call `name`, is that of a PEFT adapter."""
    return (find_folder(path, name) / ADAPTER).is_file()


def find_base(adapter: str | Path, base: str | None = None) -> Path:
    """The folder of an adapter's base model: the one that `base` says, else the one that its config names.

    Raises:
        HftcoreError: the adapter names none, or there is no such folder or hub model.
    """
    if base:
        return find_folder(base, "base model")
    folder = find_folder(adapter)
    named = _named_base(folder)
    try:
        return find_folder(named, "base model")
    except HftcoreError as error:
        raise HftcoreError(f"{error}; {folder / ADAPTER} names it: say where it is with --base") from error


def find_folder(path: str | Path, name: str = "MODEL") -> Path:
    """The local folder of a model: `path` itself, or the hub's safetensors and JSON files, downloaded or cached.

    Raises:
        HftcoreError: neither a folder nor a hub id that can be reached.
    """
    if os.path.isdir(path):
        return Path(path)
    text = str(path)
    wanted = f"{name} must be a checkpoint folder or a hub id, got {text}"
    if os.path.exists(path):
        raise HftcoreError(f"{wanted}, which is a file; give the folder it lies in")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text or not text.strip():
        raise HftcoreError(f"{wanted}, which does not exist")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_OTHER))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise HftcoreError(
            f"{wanted}, which is no folder here, and the hub did not give it: {_brief(error)}"
        ) from error


def _named_base(folder: Path) -> str:
    """The base model an adapter names: a hub id or a folder, which may be relative to the adapter."""
    try:
        named = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise HftcoreError(f"{folder / ADAPTER} is damaged ({type(error).__name__}); copy the adapter again") from error
    if not isinstance(named, str) or not named:
        raise HftcoreError(f"{folder / ADAPTER} names no base model; say which with --base")
    beside = folder / named
    return str(beside) if beside.is_dir() else named


@contextmanager
def _without_tables() -> Iterator[None]:
    """Keep transformers' tables of what did not fit out of the logs; `load_whole` says it in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_whole(folder: Path, load: Callable[[], Any]) -> tuple[Any, set[str]]:
    """The model that `load` makes of a checkpoint folder, once it is known that transformers made up none of its weights.

    Args:
        folder: for messages.
        load: calls `from_pretrained` with `output_loading_info=True` and `ignore_mismatched_sizes=True`.

    Returns:
        (model, unknown): and the names of tensors which the model has not.

    Raises:
        HftcoreError: it cannot be loaded; its files lack tensors, or have them in other shapes.
    """
    from safetensors import SafetensorError

    try:
        with _without_tables():
            model, found = load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = _brief(error)
        if "CONVERSION" in reason:  # it speaks of a table that was kept out of the logs
            reason = (
                "the parts of a fused tensor (the experts of a layer, for example) are not all there, or do not fit"
            )
        raise HftcoreError(f"cannot load a causal model from {folder}: {reason}") from error
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise HftcoreError(
            f"{folder} has {name!r} as {list(stored)}, its config.json wants {list(wanted)}; copy it again"
        )
    if missing := found["missing_keys"]:
        raise HftcoreError(
            f"{folder} lacks {len(missing)} of the model's tensors, such as {min(missing)!r}; copy the checkpoint again"
        )
    return model, found["unexpected_keys"]


def with_adapter(model: Any, folder: Path) -> Any:
    """The `PeftModel` of a base model, whose modules it replaces in place, with the factors in the dtype of their file.

    Raises:
        HftcoreError: a damaged adapter, one of another base model, or peft is missing; the base model may be half changed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise HftcoreError(f"{folder} is a PEFT adapter and peft is not installed; pip install peft") from error
    from safetensors import SafetensorError

    stored = list_tensors(folder)  # refuses what PEFT would unpickle
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise HftcoreError(f"cannot load the adapter {folder} onto its base model: {_brief(error)}") from error
    for config in adapted.peft_config.values():
        # a name relative to this folder would mislead in the folder where the adapter is saved
        beside = folder / str(config.base_model_name_or_path)
        if beside.is_dir():
            config.base_model_name_or_path = str(beside.resolve())
    # PEFT widens half-precision factors; an edit of them must fit the file they came from
    for name, parameter in adapted.named_parameters():
        place = next((stored[known] for known in names_on_disk(name) if known in stored), None)
        if place is not None and place.dtype in DTYPES:
            parameter.data = parameter.data.to(DTYPES[place.dtype])
    return adapted


def load_tokenizer(folders: list[Path]) -> Any:
    """The tokenizer of the first of the folders that has one.

    Raises:
        HftcoreError: none has, or its files are damaged.
    """
    from transformers import AutoTokenizer

    folder = next((folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        raise HftcoreError(
            f"{folders[-1]} has no tokenizer (tokenizer.json); copy the tokenizer's files into the folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise HftcoreError(f"cannot load the tokenizer from {folder}: {_brief(error)}") from error


def find_device(device: str | None) -> Any:
    """The `torch.device` of that name; None takes the first GPU if there is one.

    Raises:
        HftcoreError: there is no such device here.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HftcoreError(f"device {device!r} cannot be used here: {_brief(error)}") from error
    return place


def quiet() -> None:
    """Keep transformers' bars out of logs and pipes."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _brief(error: BaseException) -> str:
    """An error's first line, and the second where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"KeyError: {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
