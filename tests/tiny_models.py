"""Tiny random models made from configurations, and batches for them. Nothing is downloaded."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
OPT = {key: value for key, value in SMALL.items() if key not in ("intermediate_size", "num_key_value_heads")}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MOE = SMALL | {"num_experts_per_tok": 2}

SETTINGS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", SMALL),
    "llama-tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 8}),
    "mistral": ("Mistral", SMALL | {"sliding_window": 4}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": (
        "Gemma3",
        SMALL | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3", SMALL),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt-neox": ("GPTNeoX", {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    "deepseek-v3": ("DeepseekV3", SMALL | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 2}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "mixtral": ("Mixtral", MOE | {"num_local_experts": 4}),
    "gpt-oss": ("GptOss", MOE | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4}),
}
FUSED = ("qwen3-moe", "mixtral", "gpt-oss")
DENSE = tuple(name for name in SETTINGS if name not in FUSED)


@pytest.fixture
def one_thread():
    """Sums this small only get slower with more threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A causal language model with random weights, in evaluation mode."""
    kind, settings = SETTINGS[name]
    torch.manual_seed(seed)
    prefix = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{prefix}Config")(**settings)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config)
    # the usual start is so small that padding, masks and experts would hardly show
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def with_lora(model: nn.Module, target_modules: list[str], rank: int = 4) -> nn.Module:
    """The model with LoRA factors that are not zero."""
    peft = __import__("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def batch(lengths: tuple[int, ...] = (7, 4), side: str = "right", seed: int = 0, prompt: int = 2) -> dict[str, Tensor]:
    """Random token ids padded to one length, their mask, and labels that leave out padding and the first `prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
        labels[row, place] = ids[row, place]
        labels[row, place.start : place.start + prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def hooked_energies(
    model: nn.Module, batches: list[dict[str, Tensor]], keep: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    """The judge: for every module with a 2-D weight, Σ x² in float64 over the tokens for which `keep(batch)` [B, T] is true."""
    energies: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def hook(name: str) -> Callable:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().double()
            x = x.reshape(-1, x.shape[-1])[kept[0].reshape(-1)]
            energies[name] = energies.get(name, 0) + x.square().sum(dim=0)

        return see

    named = [(name, module) for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    linear = [
        (name, module) for name, module in named if module.weight.dim() == 2 and not isinstance(module, nn.Embedding)
    ]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear]
    with torch.no_grad():
        for one in batches:
            kept[:] = [keep(one)]
            model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
    for handle in handles:
        handle.remove()
    return energies


def all_tokens(one: dict[str, Tensor]) -> Tensor:
    return one["attention_mask"].bool()


def response_tokens(one: dict[str, Tensor]) -> Tensor:
    return one["attention_mask"].bool() & (one["labels"] != -100)


def fingerprint(model: nn.Module) -> tuple:
    """What must be the same after a capture: weights, hooks, modes, attributes and settings."""
    modules = list(model.modules())
    hooks = tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    bits = tuple(parameter.detach().double().sum().item() for parameter in model.parameters())
    experts = str(getattr(getattr(model, "config", None), "_experts_implementation", None))
    return hooks, bits, tuple(m.training for m in modules), tuple(len(vars(m)) for m in modules), experts
