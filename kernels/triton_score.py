"""What the Triton kernels share: the key of a score, and the two ways of removing.

The key is the bit pattern of `|w| * norm`, one float32 product. No product here is followed by an addition, so there is nothing
a compiler could contract, and Triton's plain arithmetic keeps denormals on NVIDIA and AMD alike; `tests/test_compile.py` holds
both in the generated code. Lanes past the last column carry `OUTSIDE`, which no finite threshold reaches.

Element offsets are int64 throughout: an embedding of a large model has more than 2**31 weights.
"""

import triton
import triton.language as tl
from torch import Tensor

FINITE = tl.constexpr(0x7F800000)  # keys from here on are infinities and NaNs
OUTSIDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def widened(w):
    """float32 of the same value. A bfloat16 is its upper half; Triton's interpreter would lose denormals in a conversion."""
    if w.dtype == tl.bfloat16:
        return (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return w.to(tl.float32)


@triton.jit
def score_keys(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    weight_at,  # [...] int64 element offsets
    reference_at,  # [...] int64
    cols,  # [...] broadcasts to weight_at
    inside,  # [...] bool
    in_cols,  # [...] bool, broadcasts
    HAS_REFERENCE: tl.constexpr,
):
    w = widened(tl.load(weight_ptr + weight_at, mask=inside, other=0.0))
    if HAS_REFERENCE:
        w -= widened(tl.load(reference_ptr + reference_at, mask=inside, other=0.0))
    norm = tl.load(norm_ptr + cols, mask=in_cols, other=0.0)
    # a NaN may come out with its sign set
    key = (tl.abs(w) * norm).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(in_cols, key, OUTSIDE)


@triton.jit
def remove_in_place(weight_ptr, reference_ptr, weight_at, reference_at, removed, inside, HAS_REFERENCE: tl.constexpr):
    # whole vectors are written back: scattered two-byte stores of the removed weights alone cost more
    w = tl.load(weight_ptr + weight_at, mask=inside, other=0.0)
    if HAS_REFERENCE:
        w = tl.where(removed, tl.load(reference_ptr + reference_at, mask=inside, other=0.0), w)
    else:
        w = tl.where(removed, 0.0, w).to(w.dtype)
    tl.store(weight_ptr + weight_at, w, mask=inside)


@triton.jit
def store_bits(
    mask_ptr,  # [M, ceil(N / 8)] uint8, contiguous
    removed,  # [BLOCK_M, BLOCK_N] bool, False outside the matrix
    rows,  # [BLOCK_M] int64
    start,  # first column of the tile, a multiple of 8
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bits = tl.reshape(removed.to(tl.int32), [BLOCK_M, BLOCK_N // 8, 8])
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
    length = (N + 7) // 8
    places = start // 8 + tl.arange(0, BLOCK_N // 8)
    inside = (rows < M)[:, None] & (places < length)[None, :]
    tl.store(mask_ptr + rows[:, None] * length + places[None, :], packed, mask=inside)


def arguments(weight: Tensor, norm: Tensor, reference: Tensor | None, *outputs: Tensor) -> tuple[Tensor | int, ...]:
    """The leading arguments of every kernel: pointers, sizes and strides; without a reference the weight holds its place."""
    other = weight if reference is None else reference
    return (weight, norm, other, *outputs, *weight.shape, *weight.stride(), *other.stride())
