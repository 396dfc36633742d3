"""Training steps: per-sample gradient norms of a whole model beside one plain forward and backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hftcore
from hftcore.bench.job import Job, UnavailableError, shape_of
from hftcore.bench.models import model_of, tokens_of
from hftcore.bench.packages import OPACUS, nothing, opacus_peers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN_STEP = "one plain step"


@dataclass(frozen=True)
class Step:
    """What is asked of one batch.

    Fields:
        norms_only: whether the ordinary gradients are wanted too.
        rank: of LoRA factors on every linear layer, which alone are trained; None: all weights are.
    """

    about: str
    norms_only: bool
    rank: int | None = None

    def __call__(self, model: "PreTrainedModel", ids: Tensor) -> Tensor:
        with hftcore.capture_grad_norms(model, norms_only=self.norms_only) as norms:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return norms.per_sample


STEPS = {
    "grad norms": Step("each sample's gradient norm and the ordinary gradients", norms_only=False),
    "grad norms only": Step("each sample's gradient norm, no gradients", norms_only=True),
    **{
        f"LoRA r{rank} grad norms": Step(
            f"LoRA of rank {rank} on every linear layer, each sample's gradient norm and the ordinary gradients",
            False,
            rank,
        )
        for rank in (8, 32)
    },
}


def step_job(step: Step) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares a step on a randomly initialised Llama; every token has a label."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        samples, length = shape_of(shape, dtype)
        model = model_of(shape, dtype, device)
        ids = tokens_of(model, samples, length, device)
        if step.rank is None:
            remote, missing, close = opacus_peers(model, ids)
        else:
            model = with_lora(model, step.rank)
            remote, missing, close = {}, dict.fromkeys(OPACUS, "compared on whole models only"), nothing

        def plain() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return Job(
            ours=lambda: step(model, ids),
            peers={
                "loop of single-sample backwards": lambda: loop_of_backwards(model, ids),
                "torch.func vmap(grad)": lambda: vmap_of_grad(model, ids),
                **remote,
            },
            missing=missing,
            restore=lambda: model.zero_grad(set_to_none=True),
            # another order of bfloat16 roundings on the way through the model
            agrees=lambda ours, theirs: torch.allclose(
                ours, theirs.to(ours), rtol=2e-2 if dtype == torch.bfloat16 else 1e-3
            ),
            ceilings={PLAIN_STEP: plain},
            rounds=5 if length > 128 else 15,
            holds_memory=True,
            is_long=length > 128,
            close=close,
        )

    return prepare


def with_lora(model: "PreTrainedModel", rank: int) -> "PreTrainedModel":
    """The model with random factors on every linear layer but the head.

    Raises:
        UnavailableError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnavailableError('PEFT is not installed; run: pip install "hftcore[peft]"') from None
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
    return cast("PreTrainedModel", adapted.eval())


def loop_of_backwards(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """[B]: a forward and backward pass for each sample by itself."""
    norms = []
    for one in ids.split(1):
        model.zero_grad(set_to_none=True)
        model(input_ids=one, labels=one, use_cache=False).loss.backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)


def vmap_of_grad(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """[B]: every sample's whole gradient at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    # without one, transformers looks at the values of the batch to make it, which vmap cannot
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        arguments = {"input_ids": one[None], "attention_mask": mask, "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), arguments).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), one[1:])

    # of torch's attentions only the plain one can be batched this way
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    return torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
