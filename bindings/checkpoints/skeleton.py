"""A model without its weights: every layer has its name, shape and orientation, and takes no memory."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hftcore.bindings.checkpoints.stored import StoredTensor
from hftcore.bindings.models_io import load_whole, quiet
from hftcore.errors import HftcoreError


def load_skeleton(folder: Path, stored: Mapping[str, StoredTensor] | None = None) -> nn.Module:
    """The causal model that `config.json` describes; each parameter is one element seen in the parameter's shape.

    Args:
        folder: the checkpoint.
        stored: its tensors (`list_tensors`), to be refused if loading would have to make up some of the model's; None for any.

    Raises:
        HftcoreError: no readable configuration, an unknown kind of model, or a quantised one; tensors are missing or of other shapes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = folder / "config.json"
    try:
        quantised = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if quantised is None:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HftcoreError(f"cannot read from {file} what model {folder} holds: {reason}") from error
    if quantised is not None:
        raise HftcoreError(f"{folder} is quantised (quantization_config in {file.name}); dequantise it first")
    if stored is not None:
        _check_complete(folder, stored, model)
    standing: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in standing:
                element = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
                standing[parameter] = nn.Parameter(element, requires_grad=False)
            module._parameters[name] = standing[parameter]
    return model


def _check_complete(folder: Path, stored: Mapping[str, StoredTensor], model: Any) -> None:
    """Ask transformers' own loading, which knows of ties, renamed and fused tensors, what it lacks: without data it takes milliseconds."""
    quiet()
    state = {name: torch.empty(place.shape, device="meta") for name, place in stored.items()}
    load_whole(
        folder,
        lambda: type(model).from_pretrained(
            None,
            config=deepcopy(model.config),
            state_dict=state,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        ),
    )
