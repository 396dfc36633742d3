"""Run in Opacus' environment: per-sample norms of one backward pass, the three ways Opacus has."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bench.job import Job
from hftcore.bench.worker import serve


def prepare(folder: Path, request: dict[str, Any]) -> Job:
    """The step of one way ("ghost", "fast", "hooks") on the model and tokens saved in a folder."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.load(folder / "inputs.pt", weights_only=True)["ids"]
    model: Any
    if request["way"] == "hooks":
        model = GradSampleModule(bare, batch_first=True, loss_reduction="mean")
    else:
        model = GradSampleModuleFastGradientClipping(
            bare, batch_first=True, loss_reduction="mean", use_ghost_clipping=request["way"] == "ghost"
        )

    def step() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
        losses.mean().backward()
        if request["way"] == "hooks":
            squares = [p.grad_sample.flatten(1).square().sum(dim=1) for p in bare.parameters() if p.requires_grad]
            return torch.stack(squares).sum(dim=0).sqrt()
        return model.get_norm_sample()

    def restore() -> None:
        model.zero_grad(set_to_none=True)
        for parameter in bare.parameters():
            parameter.grad_sample = None
            parameter._norm_sample = None

    return Job(ours=step, peers={}, restore=restore, agrees=torch.equal, holds_memory=True)


if __name__ == "__main__":
    serve(partial(prepare, Path(sys.argv[1])))
