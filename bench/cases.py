"""The cases as data: op, shapes, dtypes, the work an ideal kernel does, and how to prepare our call, its peers and its ceilings."""

from typing import Any

import torch

from hftcore.bench import peers
from hftcore.bench.defences import DEFENCES, defence_job
from hftcore.bench.job import LAYERS, Case
from hftcore.bench.models import LARGE
from hftcore.bench.samples import (
    cross_entropy_job,
    cross_entropy_work,
    logprobs_job,
    logprobs_work,
    norms_job,
    norms_work,
)
from hftcore.bench.selection import (
    blocks_job,
    energy_job,
    energy_work,
    in_place_work,
    mask_job,
    mask_work,
    prune_job,
)
from hftcore.bench.steps import STEPS, step_job
from hftcore.bench.streaming import MOST, streaming_job
from hftcore.bench.whole import JOBS, dispatch_job, model_job
from hftcore.pattern import Pattern

FLOAT32 = (torch.float32,)
WEIGHTS = tuple(LAYERS)
SOME = ("tiny", "llama-7b.q_proj", "llama-7b.up_proj", "llama-3-70b.down_proj")

CASES: dict[str, Case] = {
    "prune_rows": Case(
        about="prune_ in place, 50 % of every row",
        shapes=(*WEIGHTS, "1gb"),
        work=in_place_work("rows", 2),
        prepare=prune_job(
            Pattern("50%"),
            lambda matrix: matrix,
            {
                "Wanda-code sort": peers.row_sort,
                "torch.topk": peers.row_topk,
                "torch.kthvalue": peers.row_kthvalue,
                "numpy.partition": peers.row_partition,
            },
            {"torch.compile of 31 counts": peers.row_bisection},
        ),
    ),
    "prune_matrix": Case(
        about="prune_ in place, 50 % of the whole matrix",
        shapes=(*SOME, "gemma-2-9b.up_proj", "lora-a", "1gb"),
        work=in_place_work("matrix", 3),
        prepare=prune_job(
            Pattern("50%", scope="matrix"),
            lambda matrix: matrix.reshape(1, -1),
            {
                "flattened torch.kthvalue": peers.matrix_kthvalue,
                "numpy.partition of all": peers.matrix_partition,
                "torch.nn.utils.prune": peers.matrix_utils_prune,
            },
        ),
    ),
    "prune_blocks": Case(
        about="prune_ in place, 10 % of the 16 x 16 blocks of the matrix",
        shapes=SOME,
        work=in_place_work("blocks", 3),
        prepare=blocks_job,
    ),
    "prune_mask": Case(
        about="prune_mask, 50 % of every row, packed bits out",
        shapes=SOME,
        work=mask_work,
        prepare=mask_job,
    ),
    "prune_2_4": Case(
        about="prune_ in place, 2 of every 4 columns",
        shapes=SOME,
        work=in_place_work("groups", 2),
        prepare=prune_job(
            Pattern("2:4"),
            lambda matrix: matrix.reshape(-1, 4),
            {"Wanda-code loop": peers.groups_of_four_loop, "torch.topk": peers.groups_of_four_topk},
        ),
    ),
    "column_energy": Case(
        about="column_energy of [T, N] activations",
        shapes=("tiny", "tokens-smollm2", "tokens-attention", "tokens-mlp"),
        work=energy_work,
        prepare=energy_job,
    ),
    "grad_norms_sq": Case(
        about="grad_norms_sq of [B, T, N] inputs and [B, T, M] output gradients",
        shapes=("tiny-samples", "samples-7b T128", "samples-7b T512", "samples-7b T2048"),
        work=norms_work,
        prepare=norms_job,
    ),
    "sequence_logprobs": Case(
        about="sequence_logprobs of [B, T, D] hidden states under a [V, D] head",
        shapes=("tiny-head", "smollm2.head", "llama-3-8b.head"),
        work=logprobs_work,
        prepare=logprobs_job,
    ),
    "weighted_cross_entropy": Case(
        about="weighted_cross_entropy of the same, and its gradients to hidden states and head",
        shapes=("tiny-head", "smollm2.head"),
        work=cross_entropy_work,
        prepare=cross_entropy_job,
    ),
    "dispatch_column_energy": Case(
        about="column_energy on one tiny input: what checks and dispatch cost",
        shapes=("dispatch",),
        work=None,
        prepare=dispatch_job("column_energy"),
        dtypes=FLOAT32,
    ),
    "dispatch_prune": Case(
        about="prune_ on one tiny input: what checks and dispatch cost",
        shapes=("dispatch",),
        work=None,
        prepare=dispatch_job("prune_"),
        dtypes=FLOAT32,
    ),
    **{
        f"step {name}": Case(
            about=f"{step.about}, against one plain forward and backward pass",
            shapes=("tiny-llama", "small-llama T128", "small-llama T512"),
            work=None,
            prepare=step_job(step),
            dtypes=(*FLOAT32, torch.bfloat16) if name == "grad norms" else FLOAT32,
        )
        for name, step in STEPS.items()
    },
    **{
        f"step {name}": Case(
            about=f"{defence.about}: update and AdamW, against that of plain fine-tuning",
            shapes=("tiny-llama", "small-llama T128"),
            work=None,
            prepare=defence_job(defence),
            dtypes=FLOAT32,
        )
        for name, defence in DEFENCES.items()
    },
    **{
        f"streaming prune, {scope} scope": Case(
            about=f"prune_folder, 50 %, scope {scope}, on the files, against one plain copy of them",
            shapes=("tiny-llama", "llama-1b"),
            work=None,
            prepare=streaming_job(scope),
            dtypes=(torch.bfloat16,),
        )
        for scope in MOST
    },
    **{
        name: Case(
            about=f"{job.about}, random tokens, against one plain forward pass",
            shapes=("tiny-llama", "smollm2-short", "smollm2"),
            work=None,
            prepare=model_job(job),
            dtypes=FLOAT32,
        )
        for name, job in JOBS.items()
    },
    **{
        f"{name} bf16": Case(
            about=f"{job.about}, random tokens and weights, against one plain forward pass; the large models on GPUs only",
            shapes=("tiny-llama", *LARGE),
            work=None,
            prepare=model_job(job),
            dtypes=(torch.bfloat16,),
        )
        for name, job in JOBS.items()
    },
}


def in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a result file as cases, shapes and dtypes are listed here, however often a file was added to; other lines last."""
    shapes = [(name, shape) for name, case in CASES.items() for shape in case.shapes]
    place = {where: number for number, where in enumerate(shapes)}
    return sorted(
        lines, key=lambda line: (place.get((line["case"], line["shape"]), len(place)), line["dtype"] != "float32")
    )
