"""Jobs that are not one kernel: the cost of dispatch, and Antidote in one call."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import hftcore
from hftcore import ops
from hftcore.backend import implementation
from hftcore.bench import peers
from hftcore.bench.job import Job, UnavailableError, shape_of
from hftcore.layers import find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BARE = "bare kernel calls"
PLAIN = "one plain pass"
DENSE_RATIO = 0.1
BATCH = 8
CALLS = 20
ROUNDS = 60  # short and many, so that both sides of a pair see the same moment


def dispatch_job(op: str) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares `op` ("column_energy" or "prune_") against the kernel calls it ends in, many calls to a time."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        rows, columns = shape_of(shape, dtype)
        data = torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
        ones = torch.ones(columns, device=device)
        pattern = hftcore.Pattern("50%")

        def bare_prune() -> Tensor:
            norm = ones.sqrt()
            implementation("nonfinite", device)(data, norm, None)
            implementation("prune_rows", device)(data, norm, None, columns // 2, False, None)
            return data

        energy_kernel = implementation("column_energy", device)
        calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "column_energy": (lambda: ops.column_energy(data), lambda: energy_kernel(data, None)),
            "prune_": (lambda: ops.prune_(data, ones, pattern), bare_prune),
        }
        ours, bare = calls[op]
        return Job(ours, {BARE: bare}, restore=lambda: None, agrees=torch.equal, inner=CALLS, rounds=ROUNDS)

    return prepare


def antidote_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares `hftcore.antidote` on random tokens; "tiny-llama" has two layers and is also compared with the published way.

    Raises:
        UnavailableError: the embedded model is not installed.
    """
    tiny = shape == "tiny-llama"
    samples, tokens = shape_of(shape, dtype)
    model = _tiny_llama() if tiny else _embedded(dtype)
    nn.Module.to(model, device)
    ids = torch.randint(0, model.config.vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.to(device).split(BATCH)]
    layers = find_layers(model)
    original = {layer.name: layer.weight.clone() for layer in layers} if tiny else {}
    edits: list[hftcore.Edit] = []

    def ours() -> None:
        with warnings.catch_warnings():
            # it warns of what it does to a model with merged weights; only its time is the question here
            warnings.simplefilter("ignore", UserWarning)
            edits.append(hftcore.antidote(model, batches, dense_ratio=DENSE_RATIO))

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def restore() -> None:
        while edits:
            edits.pop().revert(model)
        for layer in layers if tiny else ():
            layer.weight.copy_(original[layer.name])

    def agrees(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
        # energies summed in another order differ in the last bit, which can turn one weight in thousands
        return all(float((ours[name] == theirs[name]).float().mean()) > 0.999 for name in ours)

    return Job(
        ours,
        {"published way": lambda: _published_antidote(model, batches)} if tiny else {},
        restore,
        agrees,
        answer=lambda _: {layer.name: layer.weight.clone() for layer in layers},
        ceilings={PLAIN: plain},
        rounds=2,
        is_long=not tiny,
    )


def _published_antidote(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Hooks that sum squares, a stable sort of every row, the top share zeroed."""
    targets = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    energy: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[name] = energy.get(name, 0) + inputs[0].flatten(0, -2).float().square().sum(dim=0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in targets.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        for handle in handles:
            handle.remove()
        for name, module in targets.items():
            columns = module.weight.shape[1]
            kept = peers.removed_by_row_sort(module.weight, energy[name], int(columns * (1 - DENSE_RATIO)))
            module.weight[~kept] = 0


def _tiny_llama() -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def _embedded(dtype: torch.dtype) -> "PreTrainedModel":
    from hftcore.bindings import embedded

    if not embedded.is_available():
        raise UnavailableError(f"the embedded model is not installed; run: {embedded.INSTALL}")
    model, _ = embedded.load(dtype)
    return model
