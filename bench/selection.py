"""Cases of scoring and removal: pruning in place, masks, energies.

Weights are independent normal; energies are log-normal, so that input features differ by orders of magnitude as in a real layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hftcore import ops
from hftcore.bench import peers
from hftcore.bench.ceiling import ceilings, reading
from hftcore.bench.job import Job, Work, shape_of
from hftcore.pattern import Pattern

ELEMENTS = 1 << 27  # of a matrix; with more the peers sit out, for which some need ten times its memory
COMPILED = (
    "llama-7b.q_proj",
    "llama-7b.up_proj",
)  # shapes that a compiled peer is compared at: compiling takes many seconds
# operations a weight in the Triton kernels: key 3; least, most and mean 3; two compared and counted in each of some six passes 24;
# removal 3. A group of four: key 3, twelve comparisons, removal 3. Whole matrices: key and place 6 in two passes, ties 4, removal 4.
STEPS = {"rows": 33, "groups": 18, "matrix": 24, "energy": 3, "blocks": 12}


def matrix(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[M, N] weights and [N] energies, the same for everybody."""
    draw = torch.Generator(device).manual_seed(0)
    rows, columns = shape_of(shape, dtype)
    weight = torch.randn(rows, columns, generator=draw, device=device, dtype=dtype)
    energy = torch.randn(columns, generator=draw, device=device).exp_()
    return weight, energy


def in_place_work(kind: str, passes: int) -> Callable[[tuple[int, ...], int], Work]:
    """Of pruning in place: the weight crosses the bus `passes` times, the energies once."""

    def work(size: tuple[int, ...], itemsize: int) -> Work:
        rows, columns = size
        return Work(passes * rows * columns * itemsize + 4 * columns, steps=STEPS[kind] * rows * columns)

    return work


def mask_work(size: tuple[int, ...], itemsize: int) -> Work:
    rows, columns = size
    moved = rows * columns * itemsize + rows * -(-columns // 8) + 4 * columns
    return Work(moved, steps=STEPS["rows"] * rows * columns)


def energy_work(size: tuple[int, ...], itemsize: int) -> Work:
    tokens, columns = size
    return Work(tokens * columns * itemsize + 4 * columns, steps=STEPS["energy"] * tokens * columns)


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


def prune_job(
    pattern: Pattern,
    group: Callable[[Tensor], Tensor],
    ways: dict[str, Callable[..., Tensor]],
    compiled: dict[str, Callable[..., Tensor]] | None = None,
) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares an in-place case against `ways`, each called as way(weight, energy, how many of a group)."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        original, energy = matrix(shape, dtype, device)
        weight = original.clone()
        size = pattern.group[1] if pattern.group else weight.shape[1] if pattern.scope == "row" else weight.numel()
        expected = weight.numel() // size * pattern.removed(size)
        arguments = () if pattern.group else (pattern.low_count(size)[0],)
        # on a GPU, compiling would take a good part of the session
        tried = compiled if compiled and shape in COMPILED and device.type == "cpu" else {}
        possible, missing = peers.usable(ways, tried, device)
        if weight.numel() > ELEMENTS:
            possible, missing = {}, dict.fromkeys(possible, "sits out matrices of more than 2^27 weights") | missing

        def check(answer: Tensor) -> None:
            removed = answer.numel() - int(answer.count_nonzero())
            if removed != expected:
                raise ValueError(f"prune_ removed {removed} of {answer.numel()} weights, expected {expected}")

        return Job(
            ours=lambda: ops.prune_(weight, energy, pattern),
            peers={name: partial(way, weight, energy, *arguments) for name, way in possible.items()},
            missing=missing,
            compiled=tried,
            restore=lambda: weight.copy_(original),
            agrees=same_up_to_ties(original, energy, group),
            check=check,
            ceilings=ceilings(weight, original),
        )

    return prepare


def blocks_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares the removal of the lowest tenth of the 16 x 16 blocks."""
    original, energy = matrix(shape, dtype, device)
    weight = original.clone()
    pattern = Pattern("10%", scope="matrix", block=(16, 16))
    count = pattern.low_count(weight.numel() // 256)[0]

    def agrees(ours: Tensor, theirs: Tensor) -> bool:
        # sums of scores in another order may turn a block whose sum is next to the last one removed
        return float((ours == theirs).float().mean()) > 1 - 2.5 * 256 / ours.numel()

    return Job(
        ours=lambda: ops.prune_(weight, energy, pattern),
        peers={"block sums + torch.topk": lambda: peers.blocks_topk(weight, energy, count)},
        restore=lambda: weight.copy_(original),
        agrees=agrees,
        ceilings=ceilings(weight, original),
    )


def mask_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares the packed mask of half of every row."""
    weight, energy = matrix(shape, dtype, device)
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
        ceilings=reading(weight),
    )


def energy_job(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Prepares the column energy of activations."""
    x, _ = matrix(shape, dtype, device)

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
        ceilings=reading(x),
    )
