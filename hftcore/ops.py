"""The ops: checked, dispatched to a backend, and registered with torch.library under `torch.ops.hftcore`.

Everything about ranking is the same for all of them: the score of a weight is fp32(|w|) * sqrt(energy), one rounding; weights are
ordered by (score, position) ascending; a NaN or infinite score is refused before anything is changed. Masks are packed, one bit a
weight, 1 = removed: bit j (least significant first) of byte b of a row is column 8 b + j.
"""

import torch
from torch import Tensor

from hftcore import checks
from hftcore.backend import implementation
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels import reference as meaning
from hftcore.pattern import Pattern
from hftcore.selection import Part, find_cut

_compiling = torch.compiler.is_compiling


def column_energy(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of the squared value of each input feature.

    Args:
        x: [..., N] float32, bfloat16 or float16 activations; all leading axes are tokens.
        mask: bool of the leading shape; True counts. None counts every token.

    Returns:
        [N] float32 on the device of `x` (a sum, neither a mean nor a root). The same input gives the same bits on one backend,
        whatever the number of threads.

    Raises:
        HftcoreError: another dtype, or a mask of another shape.

    Source: the statistic of Sun et al. 2023 (arXiv:2306.11695), eq. 1, before the root and without dividing by the samples.

    >>> column_energy(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    tensor([25.,  2.])
    """
    if _compiling():
        return torch.ops.hftcore.column_energy(x, mask)
    if x.dtype not in checks.FLOATS or x.dim() == 0:
        raise HftcoreError(f"x must be [..., N] float32, bfloat16 or float16, got {x.dtype} {tuple(x.shape)}")
    if mask is not None:
        if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
            raise HftcoreError(
                f"mask must be bool of shape {tuple(x.shape[:-1])} (x without its last axis), got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask.reshape(-1)
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return implementation("column_energy", x.device)(x, mask)


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
    return meaning.keys(weight, checks.norm(energy, weight), reference).view(torch.float32)


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
        _block_mask(Part(weight, norm, reference), pattern, mask)
    else:
        _select(Part(weight, norm, reference), pattern, mask)
    return mask


def prune_(weight: Tensor, energy: Tensor, pattern: Pattern | str, reference: Tensor | None = None) -> Tensor:
    """Remove weights in place: score, selection and removal fused, no score matrix, no sort, no mask.

    Scope "row" and "n:m": one read that looks for NaN and infinity, then one read and one write of `weight`. Scope "matrix": two or
    three reads that count, then one read and one write.

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
    part = Part(weight, norm, reference)
    if pattern.block is not None:
        mask = prune_mask(weight, energy, pattern, reference)
        masked_put_(weight, mask, None if reference is None else masked_take(reference, mask))
        return weight
    if pattern.scope == "row" and part.call("nonfinite"):
        raise _nonfinite(part)
    _select(part, pattern, None)
    return weight


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """Packed bits as booleans.

    Args:
        mask: [M, ceil(columns / 8)] uint8, as `prune_mask` gives.
        columns: N of the weight.

    Returns:
        [M, columns] bool, True = removed.

    Raises:
        HftcoreError: a mask of another width.

    >>> unpack_mask(torch.tensor([[5]], dtype=torch.uint8), 3)
    tensor([[ True, False,  True]])
    """
    if mask.dim() != 2 or mask.dtype != torch.uint8 or mask.shape[1] != -(-columns // 8):
        raise HftcoreError(
            f"mask must be uint8 [M, {-(-columns // 8)}] (one bit for each of {columns} columns), got {mask.dtype} {tuple(mask.shape)}"
        )
    return meaning.unpack(mask, columns)


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans [M, N] as packed bits [M, ceil(N / 8)] uint8; the inverse of `unpack_mask`.

    Raises:
        HftcoreError: not a boolean matrix.

    >>> pack_mask(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.uint8)
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise HftcoreError(f"mask must be bool [M, N], got {mask.dtype} {tuple(mask.shape)}")
    return meaning.pack(mask)


def masked_take(weight: Tensor, mask: Tensor) -> Tensor:
    """The weights a packed mask marks, in row-major order: [R], dtype of weight.

    Raises:
        HftcoreError: the mask does not fit the weight.

    >>> masked_take(torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([[5]], dtype=torch.uint8))
    tensor([3., 1.])
    """
    _fits(weight, mask)
    return implementation("masked_take", weight.device)(weight, mask)


def masked_put_(weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Tensor:
    """Write `values` ([R], row-major order; None: zeros) where a packed mask marks, in place; returns `weight`.

    Raises:
        HftcoreError: the mask does not fit, or the number or dtype of the values differs.

    >>> masked_put_(torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([[5]], dtype=torch.uint8))
    tensor([[ 0., -4.,  0.]])
    """
    _fits(weight, mask)
    if values is not None:
        marked = count_mask(mask)
        if values.shape != (marked,) or values.dtype != weight.dtype:
            raise HftcoreError(
                f"values must be {weight.dtype} of shape ({marked},) (one for each marked weight), got {values.dtype} {tuple(values.shape)}"
            )
        checks.same_device("values", values, weight)
    implementation("masked_put", weight.device)(weight, mask, values)
    return weight


def count_mask(mask: Tensor) -> int:
    """How many weights a packed mask marks.

    >>> count_mask(torch.tensor([[5, 255]], dtype=torch.uint8))
    10
    """
    bits = mask - ((mask >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return int(((bits + (bits >> 4)) & 0x0F).sum())


def fingerprint(tensor: Tensor) -> str:
    """A 64-bit fingerprint of a tensor's dtype, shape and every bit; the same on every backend and device.

    Not cryptographic: it tells a wrong or changed tensor from the right one, not an adversary's.

    >>> fingerprint(torch.zeros(2, 2)) == fingerprint(torch.zeros(4))
    False
    """
    bits = tensor.detach().contiguous()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    shape = "x".join(map(str, tensor.shape))
    return (
        f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{implementation('fingerprint', tensor.device)(bits):016x}"
    )


def _checked(
    weight: Tensor, energy: Tensor, pattern: Pattern | str, reference: Tensor | None
) -> tuple[Pattern, Tensor]:
    checks.weight(weight, reference)
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
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


def _fits(weight: Tensor, mask: Tensor) -> None:
    checks.weight(weight, None)
    if mask.dtype != torch.uint8 or mask.shape != (weight.shape[0], -(-weight.shape[1] // 8)):
        raise HftcoreError(
            f"mask must be uint8 of shape ({weight.shape[0]}, {-(-weight.shape[1] // 8)}) for weight {tuple(weight.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    checks.same_device("mask", mask, weight)


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
    step = max(1, (1 << 20) // max(1, bm * part.weight.shape[1]))  # block rows unpacked at a time
    for start in range(0, scores.shape[0], step):
        blocks = meaning.unpack(of_blocks[start : start + step], scores.shape[1])
        weights = blocks.repeat_interleave(bm, 0).repeat_interleave(bn, 1)
        mask[start * bm : (start + step) * bm] = meaning.pack(weights)


def _nonfinite(part: Part) -> NonFiniteError:
    """The error for the first non-finite score in row-major order."""
    for row in range(part.weight.shape[0]):
        reference = None if part.reference is None else part.reference[row : row + 1]
        key = meaning.keys(part.weight[row : row + 1], part.norm, reference)[0] & 0x7FFFFFFF
        bad = (key >= meaning.FINITE).nonzero()
        if len(bad):
            column = int(bad[0])
            return NonFiniteError(
                f"weight[{row}, {column}] = {float(part.weight[row, column])} has a score that is NaN or infinite "
                f"(norm of its input {float(part.norm[column])}); nothing was changed"
            )
    return NonFiniteError("weight has a score that is NaN or infinite; nothing was changed")


def _prune_nothing_returned(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> None:
    prune_(weight, energy, pattern, reference)  # a registered op may not return its own argument


_library = torch.library.Library("hftcore", "DEF")
_library.define("column_energy(Tensor x, Tensor? mask) -> Tensor")
_library.define("prune_mask(Tensor weight, Tensor energy, str pattern, Tensor? reference) -> Tensor")
_library.define("prune_(Tensor(a!) weight, Tensor energy, str pattern, Tensor? reference) -> ()")
_library.impl("column_energy", column_energy, "CompositeExplicitAutograd")
_library.impl("prune_mask", prune_mask, "CompositeExplicitAutograd")
_library.impl("prune_", _prune_nothing_returned, "CompositeExplicitAutograd")


@torch.library.register_fake("hftcore::column_energy", lib=_library)
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("hftcore::prune_mask", lib=_library)
def _(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)


@torch.library.register_fake("hftcore::prune_", lib=_library)
def _(weight: Tensor, energy: Tensor, pattern: str, reference: Tensor | None) -> None:
    return None
