"""The models that whole jobs run on: the embedded real one, and randomly initialised ones with the sizes of well-known models."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hftcore.bench.job import UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAMAS: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "small-llama": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    "llama-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}
# Qwen3-30B-A3B with 6 of its 48 layers: experts as wide and as many
QWEN3_MOE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
}
LARGE = ("llama-3-8b", "qwen3-moe")


def model_of(shape: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> "PreTrainedModel":
    """The model a shape is named after, in evaluation mode on the device.

    Args:
        shape: a name out of `job.SHAPES`; what follows a blank is not the model's.
        layers: so many instead of its own, of the Llamas.

    Raises:
        UnavailableError: the embedded model is not installed, or a large one is asked for without a GPU.
    """
    name = shape.split()[0].removesuffix("-short")
    if name == "smollm2":
        model = _embedded(dtype)
        nn.Module.to(model, device)
        return model
    if name in LARGE and device.type == "cpu":
        raise UnavailableError(f"{name} is for GPUs")
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    config = Qwen3MoeConfig(**QWEN3_MOE) if name == "qwen3-moe" else LlamaConfig(**LLAMAS[name])
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with device:  # initialised where it will run: a large one would take minutes on the CPU
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def tokens_of(model: "PreTrainedModel", samples: int, length: int, device: torch.device) -> torch.Tensor:
    """[samples, length] random tokens, the same every time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (samples, length), generator=draw).to(device)


def _embedded(dtype: torch.dtype) -> "PreTrainedModel":
    from hftcore.bindings import embedded

    if not embedded.is_available():
        raise UnavailableError(f"the embedded model is not installed; run: {embedded.INSTALL}")
    model, _ = embedded.load(dtype)
    return model
