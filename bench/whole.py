"""Jobs that are not one kernel: the cost of dispatch, and whole calls on a model."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import hftcore
from hftcore import ops
from hftcore.backend import implementation
from hftcore.bench import peers
from hftcore.bench.ceiling import OP
from hftcore.bench.job import Job, shape_of
from hftcore.bench.models import LARGE, model_of, tokens_of
from hftcore.bench.packages import Peers, llmcompressor_peers, nothing, safetune_peers
from hftcore.layers import find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BARE = "bare kernel calls"
PLAIN = "one plain pass"
DENSE_RATIO = 0.1
BATCH = 8
TOO_MUCH = "sits out, for its time or memory"
CALLS = 20
ROUNDS = 60  # short and many, so that both sides of a pair see the same moment
Batches = list[dict[str, Tensor]]


def dispatch_job(op: str) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares `op` ("column_energy" or "prune_") against the kernel calls it ends in, many calls to a time."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        rows, columns = shape_of(shape, dtype)
        data = torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
        ones = torch.ones(columns, device=device)
        pattern = hftcore.Pattern("50%")

        def bare_prune() -> Tensor:
            norm = ones.sqrt()
            implementation("prune_rows", device)(data, norm, None, columns // 2, False, None)
            return data

        energy_kernel = implementation("column_energy", device)
        calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "column_energy": (lambda: ops.column_energy(data), lambda: energy_kernel(data, None)),
            "prune_": (lambda: ops.prune_(data, ones, pattern), bare_prune),
        }
        ours, bare = calls[op]
        return Job(
            ours,
            {BARE: bare},
            restore=lambda: None,
            agrees=torch.equal,
            ceilings={OP: lambda: ones.mul_(1)},
            inner=CALLS,
            rounds=ROUNDS,
        )

    return prepare


@dataclass(frozen=True)
class ModelJob:
    """A call on a whole model and its batches.

    Fields:
        call: ours; returns an Edit to be reverted, an Energy, or nothing.
        published: the way of the published codes.
        shapes: of those, at which the published way is not too slow.
        changes: whether weights change, so that they are compared and brought back.
        package: gives the peers that are packages.
    """

    about: str
    call: Callable[[nn.Module, Batches], Any]
    published: Callable[[nn.Module, Batches], Any]
    shapes: tuple[str, ...] = ("tiny-llama", "smollm2-short", *LARGE)
    changes: bool = True
    package: Callable[["PreTrainedModel", Tensor], Peers] | None = None


def published_energies(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Hooks that sum the squares of a float32 copy, one for each layer, and the whole model with its head."""
    targets = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    energy: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[name] = energy.get(name, 0) + inputs[0].flatten(0, -2).float().square().sum(dim=0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in targets.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return energy


def _published_prune(model: nn.Module, batches: Batches, share: float, lowest: bool) -> None:
    """Energies, then a stable sort of every row and a masked zero."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, energy in published_energies(model, batches).items():
            weight = modules[name].weight
            low = peers.removed_by_row_sort(weight, energy, int(weight.shape[1] * share))
            weight[low if lowest else ~low] = 0


def _published_block_by_block(model: nn.Module, batches: Batches) -> None:
    """A pass over the whole model for each block, with the blocks before it pruned, to prune that block."""
    modules = dict(model.named_modules())
    blocks = [name for name in modules if re.fullmatch(r".*\.layers\.\d+", name)]
    for block in blocks:
        energies = published_energies(model, batches)
        with torch.no_grad():
            for name, energy in energies.items():
                if name.startswith(f"{block}."):
                    weight = modules[name].weight
                    weight[peers.removed_by_row_sort(weight, energy, weight.shape[1] // 2)] = 0


def _published_model_scope(model: nn.Module, batches: Batches) -> None:
    """Energies, every score of the model in one tensor, torch.kthvalue of it as the threshold."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        energies = published_energies(model, batches)
        scores = [peers.scores(modules[name].weight, energy) for name, energy in energies.items()]
        every = torch.cat([score.flatten() for score in scores])
        threshold = every.kthvalue(every.numel() // 2).values
        for name, score in zip(energies, scores, strict=True):
            modules[name].weight.masked_fill_(score <= threshold, 0.0)


def _antidote(model: nn.Module, batches: Batches) -> hftcore.Edit:
    with warnings.catch_warnings():
        # it warns of what it does to a model with merged weights; only its time is the question here
        warnings.simplefilter("ignore", UserWarning)
        return hftcore.antidote(model, batches, dense_ratio=DENSE_RATIO)


def _wanda(model: nn.Module, batches: Batches, scope: Any = "row") -> hftcore.Edit:
    return hftcore.prune(model, hftcore.calibrate(model, batches), hftcore.Pattern("50%", scope=scope))


JOBS: dict[str, ModelJob] = {
    "calibrate": ModelJob("hftcore.calibrate", hftcore.calibrate, published_energies, changes=False),
    "antidote": ModelJob(
        "hftcore.antidote",
        _antidote,
        lambda model, batches: _published_prune(model, batches, 1 - DENSE_RATIO, lowest=False),
        package=safetune_peers,
    ),
    "wanda": ModelJob(
        "hftcore.calibrate and hftcore.prune, 50 % of every row",
        _wanda,
        lambda model, batches: _published_prune(model, batches, 0.5, lowest=True),
    ),
    "wanda block by block": ModelJob(
        "hftcore.prune with sequential=True, 50 % of every row",
        lambda model, batches: hftcore.prune(model, batches, hftcore.Pattern("50%"), sequential=True),
        _published_block_by_block,
        shapes=("tiny-llama",),
        package=llmcompressor_peers,
    ),
    "wanda model scope": ModelJob(
        "hftcore.calibrate and hftcore.prune, 50 % of the whole model",
        lambda model, batches: _wanda(model, batches, "model"),
        _published_model_scope,
    ),
}


def model_job(job: ModelJob) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares a call on random tokens. The published way stands beside it where the model is small or on a GPU."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        samples, tokens = shape_of(shape, dtype)
        model = model_of(shape, dtype, device)
        ids = tokens_of(model, samples, tokens, device)
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]
        # a second copy of a large model would not fit, so only energies can be compared there
        is_restored = job.changes and shape not in ("smollm2", *LARGE)
        is_compared = shape in job.shapes and (is_restored or not job.changes)
        packages, missing, close = job.package(model, ids) if job.package else ({}, {}, nothing)
        if not is_restored:
            packages, missing = {}, dict.fromkeys(packages, TOO_MUCH) | missing
        layers = find_layers(model) if is_restored else []
        original = {layer.name: layer.weight.clone() for layer in layers}
        edits: list[hftcore.Edit] = []

        def ours() -> Any:
            done = job.call(model, batches)
            if isinstance(done, hftcore.Edit):
                edits.append(done)
            return done

        def plain() -> None:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)

        def restore() -> None:
            while edits:
                edits.pop().revert(model)
            with torch.no_grad():
                for layer in layers:
                    layer.weight.copy_(original[layer.name])

        def answer(done: Any) -> dict[str, Tensor]:
            return {layer.name: layer.weight.clone() for layer in layers} if job.changes else dict(done)

        def agrees(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
            if not job.changes:
                # the published way has no hooks for fused experts, and one for each router
                return all(torch.allclose(ours[name], theirs[name], rtol=1e-3) for name in theirs if name in ours)
            # energies summed in another order differ in the last bit, which can turn one weight in thousands
            return all(float((ours[name] == theirs[name]).float().mean()) > 0.999 for name in ours)

        return Job(
            ours,
            ({"published way": lambda: job.published(model, batches)} if is_compared else {}) | packages,
            restore,
            agrees,
            answer=answer,
            missing=({} if is_compared else {"published way": TOO_MUCH}) | missing,
            close=close,
            ceilings={PLAIN: plain},
            rounds=2 if device.type == "cpu" else 5,
            is_long=shape != "tiny-llama",
        )

    return prepare
