"""The cases as data: op, shapes, dtypes, the bytes an ideal kernel moves, and how to prepare our call, its peers and its ceilings.

Weights are independent normal; energies are log-normal, so that input features differ by orders of magnitude as in a real layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bench import peers
from hftcore.bench.ceiling import READ, ceilings
from hftcore.bench.job import Case, Job, shape_of
from hftcore.bench.whole import antidote_job, dispatch_job
from hftcore.pattern import Pattern

LAYERS = ("tiny", "llama-7b.q_proj", "llama-7b.up_proj")


def _matrix(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    rows, columns = shape_of(shape, dtype)
    matrix = torch.randn(rows, columns, generator=draw, device=device, dtype=dtype)
    energy = torch.randn(columns, generator=draw, device=device).exp_()
    return matrix, energy


def same_up_to_ties(
    original: Tensor, energy: Tensor, group: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], bool]:
    """A comparison of two answers, both pruned weights or both booleans of what was removed.

    Args:
        original: [M, N] the weights before.
        energy: [N].
        group: views a matrix as [groups, size].

    Returns:
        True where the answers are equal but for weights whose score is the highest removed one of their group: those are ties,
        which other code breaks otherwise or removes together.
    """

    def agrees(ours: Tensor, theirs: Tensor) -> bool:
        differ = group(ours != theirs)
        if not differ.any():
            return True
        removed = ours if ours.dtype == torch.bool else ours == 0
        score = group(peers.scores(original, energy))
        threshold = score.masked_fill(~group(removed), -1.0).amax(dim=1, keepdim=True)
        return bool((score == threshold)[differ].all())

    return agrees


def _prune(
    pattern: Pattern, group: Callable[[Tensor], Tensor], ways: dict[str, Callable[..., Tensor]]
) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares an in-place case. The peers sit out the 1 GB matrix, for which some need ten times its memory."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        original, energy = _matrix(shape, dtype, device)
        weight = original.clone()
        size = pattern.group[1] if pattern.group else weight.shape[1] if pattern.scope == "row" else weight.numel()
        expected = weight.numel() // size * pattern.removed(size)
        arguments = () if pattern.group else (pattern.low_count(size)[0],)

        def check(answer: Tensor) -> None:
            removed = answer.numel() - int(answer.count_nonzero())
            if removed != expected:
                raise ValueError(f"prune_ removed {removed} of {answer.numel()} weights, expected {expected}")

        return Job(
            ours=lambda: ops.prune_(weight, energy, pattern),
            peers={name: partial(way, weight, energy, *arguments) for name, way in ways.items() if shape != "1gb"},
            restore=lambda: weight.copy_(original),
            agrees=same_up_to_ties(original, energy, group),
            check=check,
            ceilings=ceilings(weight, original),
        )

    return prepare


def _mask(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    weight, energy = _matrix(shape, dtype, device)
    pattern = Pattern("50%")
    count = pattern.low_count(weight.shape[1])[0]
    agrees = same_up_to_ties(weight, energy, lambda matrix: matrix)
    return Job(
        ours=lambda: ops.prune_mask(weight, energy, pattern),
        peers={
            "Wanda-code sort": lambda: peers.removed_by_row_sort(weight, energy, count),
            "torch.topk": lambda: peers.removed_by_row_topk(weight, energy, count),
        },
        restore=lambda: None,
        agrees=lambda ours, theirs: agrees(ops.unpack_mask(ours, weight.shape[1]), theirs),
        ceilings={READ: lambda: weight.sum()},
    )


def _energy(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    x, _ = _matrix(shape, dtype, device)

    def agrees(ours: Any, theirs: Any) -> bool:
        return torch.allclose(ours, theirs, rtol=1e-4)

    return Job(
        ours=lambda: ops.column_energy(x),
        peers={
            "square().sum()": lambda: peers.energy_square_sum(x),
            "Wanda-code norm": lambda: peers.energy_norm(x),
        },
        restore=lambda: None,
        agrees=agrees,
        ceilings={READ: lambda: x.sum()},
    )


CASES: dict[str, Case] = {
    "prune_rows": Case(
        about="prune_ in place, 50 % of every row",
        shapes=(*LAYERS, "lora-a", "lora-b", "1gb"),
        bytes_moved=lambda rows, columns, itemsize: 2 * rows * columns * itemsize + 4 * columns,
        prepare=_prune(
            Pattern("50%"),
            lambda matrix: matrix,
            {"Wanda-code sort": peers.row_sort, "torch.topk": peers.row_topk, "torch.kthvalue": peers.row_kthvalue},
        ),
    ),
    "prune_matrix": Case(
        about="prune_ in place, 50 % of the whole matrix",
        shapes=(*LAYERS, "1gb"),
        bytes_moved=lambda rows, columns, itemsize: 3 * rows * columns * itemsize + 4 * columns,
        prepare=_prune(
            Pattern("50%", scope="matrix"),
            lambda matrix: matrix.reshape(1, -1),
            {"flattened torch.kthvalue": peers.matrix_kthvalue},
        ),
    ),
    "prune_mask": Case(
        about="prune_mask, 50 % of every row, packed bits out",
        shapes=LAYERS,
        bytes_moved=lambda rows, columns, itemsize: rows * columns * itemsize + rows * columns // 8 + 4 * columns,
        prepare=_mask,
    ),
    "prune_2_4": Case(
        about="prune_ in place, 2 of every 4 columns",
        shapes=LAYERS,
        bytes_moved=lambda rows, columns, itemsize: 2 * rows * columns * itemsize + 4 * columns,
        prepare=_prune(
            Pattern("2:4"),
            lambda matrix: matrix.reshape(-1, 4),
            {"Wanda-code loop": peers.groups_of_four_loop, "torch.topk": peers.groups_of_four_topk},
        ),
    ),
    "column_energy": Case(
        about="column_energy of [T, N] activations",
        shapes=("tiny", "tokens-attention", "tokens-mlp"),
        bytes_moved=lambda rows, columns, itemsize: rows * columns * itemsize + 4 * columns,
        prepare=_energy,
    ),
    "dispatch_column_energy": Case(
        about="column_energy on one tiny input: what checks and dispatch cost",
        shapes=("dispatch",),
        bytes_moved=None,
        prepare=dispatch_job("column_energy"),
        dtypes=(torch.float32,),
    ),
    "dispatch_prune": Case(
        about="prune_ on one tiny input: what checks and dispatch cost",
        shapes=("dispatch",),
        bytes_moved=None,
        prepare=dispatch_job("prune_"),
        dtypes=(torch.float32,),
    ),
    "antidote": Case(
        about="hftcore.antidote on SmolLM2-135M, random tokens, against one plain forward pass",
        shapes=("tiny-llama", "smollm2-short", "smollm2"),
        bytes_moved=None,
        prepare=antidote_job,
        dtypes=(torch.float32,),
    ),
}
