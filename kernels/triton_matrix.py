"""Triton kernels of a selection over a whole matrix or model: count the keys, then cut at one threshold.

`score_histogram` reads the weight once. Keys below and above the window and those that are not finite are counted in registers
and added once a program; only keys inside the window pay an atomic addition each. Callers narrow the window to where the
threshold can be, so that few do. The counts are integers: any order of additions gives the same bits.

`cut` is one read and one write (or an eighth of a byte a weight): a program walks along its rows and carries the number of ties
it has met, and counts through a tile only where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import launch
from hftcore.kernels.triton_score import FINITE, arguments, remove_in_place, score_keys, store_bits


# what changes from call to call must not compile anew
@triton.jit(do_not_specialize=["low", "shift", "bins", "copies"])
def _score_histogram_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    counts_ptr,  # [copies, bins + 3] int64
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    low,
    shift,
    bins,
    copies,
    HAS_REFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    copy_ptr = counts_ptr + (tl.program_id(0) % copies) * (bins + 3)
    below = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    spoiled = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        inside = in_rows & (cols < N)
        wide = cols.to(tl.int64)
        key = score_keys(
            weight_ptr, norm_ptr, reference_ptr, rows[:, None] * stride_wm + wide * stride_wn,
            rows[:, None] * stride_rm + wide * stride_rn, cols, inside, cols < N, HAS_REFERENCE,
        )  # fmt: skip
        is_finite = inside & (key < FINITE)
        # the difference is >= 0 wherever it is used
        place = (key - low) >> shift
        in_window = is_finite & (key >= low) & (place < bins)
        tl.atomic_add(copy_ptr + 1 + place, 1, mask=in_window, sem="relaxed")
        below += (is_finite & (key < low)).to(tl.int32)
        spoiled += (inside & (key >= FINITE)).to(tl.int32)
    tl.atomic_add(copy_ptr, tl.sum(tl.sum(below, axis=1), axis=0), sem="relaxed")
    tl.atomic_add(copy_ptr + bins + 2, tl.sum(tl.sum(spoiled, axis=1), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["threshold"])
def _tie_counts_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    ties_ptr,  # [M] int64
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    threshold,
    HAS_REFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    ties = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        inside = in_rows & (cols < N)
        wide = cols.to(tl.int64)
        key = score_keys(
            weight_ptr, norm_ptr, reference_ptr, rows[:, None] * stride_wm + wide * stride_wn,
            rows[:, None] * stride_rm + wide * stride_rn, cols, inside, cols < N, HAS_REFERENCE,
        )  # fmt: skip
        ties += (inside & (key == threshold)).to(tl.int32)
    tl.store(ties_ptr + rows, tl.sum(ties, axis=1).to(tl.int64), mask=rows < M)


@triton.jit(do_not_specialize=["threshold"])
def _cut_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    mask_ptr,  # [M, ceil(N / 8)] uint8
    quota_ptr,  # [M] int64
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    threshold,
    INVERT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TO_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    room = tl.load(quota_ptr + rows, mask=rows < M, other=0)
    room = tl.minimum(room, N).to(tl.int32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        inside = in_rows & (cols < N)
        wide = cols.to(tl.int64)
        weight_at = rows[:, None] * stride_wm + wide * stride_wn
        reference_at = rows[:, None] * stride_rm + wide * stride_rn
        key = score_keys(
            weight_ptr, norm_ptr, reference_ptr, weight_at, reference_at, cols, inside, cols < N, HAS_REFERENCE
        )
        tie = (inside & (key == threshold)).to(tl.int32)
        low = (key < threshold).to(tl.int32)
        met = tl.sum(tie, axis=1)
        if tl.max(met, axis=0) > 0:
            low += tie * (tl.cumsum(tie, axis=1) <= room[:, None]).to(tl.int32)
        room -= met
        removed = ((low > 0) != INVERT) & inside
        if TO_MASK:
            store_bits(mask_ptr, removed, rows, start, M, N, BLOCK_M, BLOCK_N)
        else:
            remove_in_place(weight_ptr, reference_ptr, weight_at, reference_at, removed, inside, HAS_REFERENCE)


def score_histogram(weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, shift: int, bins: int) -> Tensor:
    """[bins + 3] int64: counts of keys below, in, above the window, and of those that are not finite."""
    M, N = weight.shape
    copies = launch.histogram_copies(bins)
    counts = torch.zeros((copies, bins + 3), dtype=torch.int64, device=weight.device)
    if M * N == 0:
        return counts[0]
    tile = launch.band_tile(M, N, *weight.stride())
    _score_histogram_kernel[(triton.cdiv(M, tile.block_m),)](
        *arguments(weight, norm, reference, counts),
        low,
        shift,
        bins,
        copies,
        HAS_REFERENCE=reference is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    total = counts.sum(dim=0)
    # whatever was counted nowhere else lies above the window
    total[bins + 1] = M * N - total.sum()
    return total


def nonfinite(weight: Tensor, norm: Tensor, reference: Tensor | None) -> int:
    """How many scores are not finite: a histogram whose window lies above every finite key counts them without an atomic on a bin."""
    return int(score_histogram(weight, norm, reference, FINITE.value, 0, 256)[-1])


def tie_counts(weight: Tensor, norm: Tensor, reference: Tensor | None, key: int) -> Tensor:
    """[M] int64: how many weights of each row have this key."""
    M, N = weight.shape
    ties = torch.zeros(M, dtype=torch.int64, device=weight.device)
    if M * N == 0:
        return ties
    tile = launch.band_tile(M, N, *weight.stride())
    _tie_counts_kernel[(triton.cdiv(M, tile.block_m),)](
        *arguments(weight, norm, reference, ties),
        key,
        HAS_REFERENCE=reference is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    return ties


def cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    key: int,
    quota: Tensor,
    invert: bool,
    mask: Tensor | None,
) -> None:
    """Removes in place, or writes the mask: keys below `key` and the first `quota[r]` ties of row r, or all but these."""
    M, N = weight.shape
    if M * N == 0:
        return
    tile = launch.band_tile(M, N, *weight.stride())
    _cut_kernel[(triton.cdiv(M, tile.block_m),)](
        *arguments(weight, norm, reference, weight if mask is None else mask, quota),
        key,
        INVERT=invert,
        HAS_REFERENCE=reference is not None,
        TO_MASK=mask is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
