"""Score, select, remove: fused, exact, with neither a score matrix nor a sort."""

import torch
from torch import Tensor

from hftcore import checks
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels import reference as meaning
from hftcore.ops.masks import masked_put_, masked_take
from hftcore.parts import Part
from hftcore.pattern import Pattern
from hftcore.selection import find_cut

_compiling = torch.compiler.is_compiling


def wanda_scores(weight: Tensor, energy: Tensor, reference: Tensor | None = None) -> Tensor:
    """Importance of each weight: |weight[m, n]| * sqrt(energy[n]), or |weight - reference| * sqrt(energy).

    For looking at scores; `prune_mask` and `prune_` never build this matrix.

    Args:
        weight: [M, N] = [out_features, in_features], float32, bfloat16 or float16; any strides.
        energy: [N] float32, sum over tokens of squared inputs (`column_energy`).
        reference: [M, N], dtype of weight: scores the difference from it, taken in float32.

    Returns:
        [M, N] float32, in the unit of the layer's output.

    Raises:
        HftcoreError: shapes, dtypes or devices do not fit; energy negative or not finite.

    Source: Sun et al. 2023 (arXiv:2306.11695), eq. 1; with a reference, the `use_diff` score of Wei et al. 2024 (arXiv:2402.05162).

    >>> wanda_scores(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 4.0]))
    tensor([[3., 8.]])
    """
    checks.weight(weight, reference)
    norm = checks.norm(energy, weight)
    checks.finite_norm(norm)
    return meaning.keys(weight, norm, reference).view(torch.float32)


def prune_mask(weight: Tensor, energy: Tensor, pattern: Pattern | str, reference: Tensor | None = None) -> Tensor:
    """Which weights a pattern removes. The weights are not changed.

    Args:
        weight: [M, N] float32, bfloat16 or float16; any strides (a transposed view is not copied).
        energy: [N] float32, sum over tokens of squared inputs.
        pattern: a `Pattern` (scope "model" needs `hftcore.prune`), or its text.
        reference: [M, N], dtype of weight: the score is that of weight - reference.

    Returns:
        [M, ceil(N / 8)] uint8, one bit a weight, 1 = removed (`unpack_mask` makes booleans).

    Raises:
        HftcoreError: arguments that do not fit; `NonFiniteError` naming the first weight whose score is NaN or infinite.

    >>> unpack_mask(prune_mask(torch.tensor([[3.0, -4.0, 1.0, 9.0]]), torch.ones(4), Pattern("50%")), 4)
    tensor([[ True, False,  True, False]])
    """
    if _compiling():
        return torch.ops.hftcore.prune_mask(weight, energy, str(pattern), reference)
    pattern, norm = _checked(weight, energy, pattern, reference)
    mask = torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8, device=weight.device)
    if pattern.block is not None:
        _block_mask(Part(weight.detach(), norm, reference), pattern, mask)
    else:
        _select(Part(weight.detach(), norm, reference), pattern, mask)
    return mask


def prune_(weight: Tensor, energy: Tensor, pattern: Pattern | str, reference: Tensor | None = None) -> Tensor:
    """Remove weights in place: score, selection and removal fused, no score matrix, no sort, no mask.

    Scope "row" and "n:m": one read that selects or looks for NaN and infinity, then one read and one write of `weight`. Scope "matrix":
    two or three reads that count, then one read and one write.

    Args:
        weight: [M, N] float32, bfloat16 or float16; any strides. Changed in place.
        energy: [N] float32, sum over tokens of squared inputs.
        pattern: a `Pattern` (scope "model" needs `hftcore.prune`), or its text.
        reference: [M, N], dtype of weight: scores weight - reference, and removed weights take its value instead of zero.

    Returns:
        `weight`.

    Raises:
        HftcoreError: as `prune_mask`; nothing has been changed then.

    >>> prune_(torch.tensor([[3.0, -4.0, 1.0, 9.0]]), torch.ones(4), Pattern("50%"))
    tensor([[ 0., -4.,  0.,  9.]])
    """
    if _compiling():
        torch.ops.hftcore.prune_(weight, energy, str(pattern), reference)
        return weight
    pattern, norm = _checked(weight, energy, pattern, reference)
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise HftcoreError(
            f"weight must have a place of its own for each of its {tuple(weight.shape)} weights, got strides {weight.stride()}; "
            "call .contiguous() on the expanded tensor first"
        )
    part = Part(weight.detach(), norm, reference)
    if pattern.block is not None:
        mask = prune_mask(weight, energy, pattern, reference)
        masked_put_(weight, mask, None if reference is None else masked_take(reference, mask))
        return weight
    _select(part, pattern, None)
    return weight


def _checked(
    weight: Tensor, energy: Tensor, pattern: Pattern | str, reference: Tensor | None
) -> tuple[Pattern, Tensor]:
    checks.weight(weight, reference)
    pattern = Pattern.of(pattern)
    rows, columns = weight.shape
    if pattern.scope == "model":
        raise HftcoreError(
            'scope "model" compares the weights of all layers: call hftcore.prune(model, energy, pattern)'
        )
    if pattern.group is not None and columns % pattern.group[1]:
        raise HftcoreError(
            f"sparsity {pattern.sparsity!r} needs columns in groups of {pattern.group[1]}, weight has {columns}"
        )
    if pattern.block is not None and (rows % pattern.block[0] or columns % pattern.block[1]):
        raise HftcoreError(
            f"block {pattern.block} does not divide weight of shape ({rows}, {columns}); choose sizes that do"
        )
    return pattern, checks.norm(energy, weight)


def _select(part: Part, pattern: Pattern, mask: Tensor | None) -> None:
    """Fill the mask, or remove in place when it is None."""
    rows, columns = part.weight.shape
    if pattern.scope == "matrix":
        count, invert = pattern.low_count(rows * columns)
        try:
            cut = find_cut([lambda: part], [(rows, columns)], count)
        except NonFiniteError:
            raise _nonfinite(part) from None
        part.call("cut", cut.key, cut.quotas[0].to(part.weight.device), invert, mask)
    elif pattern.group is not None:
        count, invert = pattern.low_count(pattern.group[1])
        if part.call("prune_groups", count, pattern.group[1], invert, mask):
            raise _nonfinite(part)
    else:
        count, invert = pattern.low_count(columns)
        if part.call("prune_rows", count, invert, mask):
            raise _nonfinite(part)


def _block_mask(part: Part, pattern: Pattern, mask: Tensor) -> None:
    bm, bn = pattern.block or (1, 1)
    if part.call("nonfinite"):
        raise _nonfinite(part)
    scores = part.call("block_scores", bm, bn)
    of_blocks = torch.zeros(scores.shape[0], -(-scores.shape[1] // 8), dtype=torch.uint8, device=mask.device)
    ones = torch.ones(scores.shape[1], device=mask.device)
    try:
        _select(Part(scores, ones), pattern, of_blocks)
    except NonFiniteError:
        raise NonFiniteError(
            "weight has blocks whose sum of squared scores overflows float32; scale the weights or the energy"
        ) from None
    step = max(1, (1 << 20) // max(1, part.weight.shape[1]))  # rows of blocks unpacked at a time
    bands = mask.view(scores.shape[0], bm, mask.shape[1])
    for start in range(0, scores.shape[0], step):
        blocks = meaning.unpack(of_blocks[start : start + step], scores.shape[1])
        # the rows of a block lose the same columns
        bands[start : start + step] = meaning.pack(blocks.repeat_interleave(bn, 1))[:, None]


def _nonfinite(part: Part) -> NonFiniteError:
    """The error for the first non-finite score in row-major order; a bad energy makes its whole column so, and is raised as that."""
    checks.finite_norm(part.norm)
    for row in range(part.weight.shape[0]):
        reference = None if part.reference is None else part.reference[row : row + 1]
        key = meaning.keys(part.weight[row : row + 1], part.norm, reference)[0]
        bad = (key >= meaning.FINITE).nonzero()
        if len(bad):
            column = int(bad[0])
            if reference is not None and not reference[0, column].isfinite():
                return NonFiniteError(
                    f"reference[{row}, {column}] = {float(reference[0, column])} is NaN or infinite; nothing was changed"
                )
            return NonFiniteError(
                f"weight[{row}, {column}] = {float(part.weight[row, column])} has a score that is NaN or infinite "
                f"(norm of its input {float(part.norm[column])}); nothing was changed"
            )
    return NonFiniteError("weight has a score that is NaN or infinite; nothing was changed")
