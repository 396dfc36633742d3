"""Triton kernels that remove the lowest (or highest) of every row, or of every group of `m` columns, without sorting.

    low set of a row = its `count` first entries in the order (key, column)

`prune_rows` searches the threshold key of a row: the smallest t with #(key <= t) >= count. A bracket [lo, hi] is narrowed by two
probes a pass. The first two are the smallest key (which settles rows full of zeros) and a quantile of a half normal with this
row's mean; the next eight interpolate, in score and in key by turns, because the first suits smooth data and the second
outliers; then the bracket is cut in three, so that no data takes more than 1 + 8 + 20 passes. A probe that finds exactly
`count` ends the search: about 6 passes on normal weights, against 31 of a bisection of the bits. If the threshold has more
ties than room, the same search over columns finds the last tie that belongs to the low set; no scan is made.

Tiling: short rows share a program; rows up to `launch.WIDEST_IN_REGISTERS` are read once and their keys stay in registers; of
longer rows the keys are made anew in every pass, from the cache. Traffic: one read and one write of the weight (or of an
eighth of a byte a weight for a mask).

`prune_groups` ranks each weight of a group against the others of its group, in registers.
"""

import math
import statistics

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import launch
from hftcore.kernels.eager import empty_mask
from hftcore.kernels.triton_matrix import nonfinite
from hftcore.kernels.triton_score import FINITE, OUTSIDE, arguments, remove_in_place, score_keys, store_bits

INTERPOLATIONS = tl.constexpr(8)


@triton.jit
def _between(lo, hi, part, AS_SCORES: tl.constexpr):
    if AS_SCORES:
        bottom = lo.to(tl.float32, bitcast=True)
        top = hi.to(tl.float32, bitcast=True)
        return (bottom + (top - bottom) * part).to(tl.int32, bitcast=True)
    return lo + ((hi - lo).to(tl.float32) * part).to(tl.int32)


@triton.jit
def _probes(lo, hi, below, within, count, turn, OVER_KEYS: tl.constexpr):
    # the wanted rank lies `part` of the way through the entries of the bracket, give or take a standard deviation
    entries = tl.maximum(within - below, 1).to(tl.float32)
    part = tl.minimum(tl.maximum((count - below).to(tl.float32) - 0.5, 0.0) / entries, 1.0)
    spread = tl.sqrt_rn(part * (1.0 - part) / entries)
    left = tl.maximum(part - spread, 0.0)
    right = tl.minimum(part + spread, 1.0)
    first = _between(lo, hi, left, False)
    second = _between(lo, hi, right, False)
    if OVER_KEYS:
        first = tl.where(turn % 2 == 1, _between(lo, hi, left, True), first)
        second = tl.where(turn % 2 == 1, _between(lo, hi, right, True), second)
    third = (hi - lo) // 3
    first = tl.where(turn > INTERPOLATIONS, lo + third, first)
    second = tl.where(turn > INTERPOLATIONS, hi - 1 - third, second)
    first = tl.maximum(tl.minimum(first, hi - 1), lo)
    return first, tl.maximum(tl.minimum(second, hi - 1), first)


@triton.jit
def _narrow(lo, hi, below, within, count, first, second, up_to_first, up_to_second):
    # below = #(< lo) < count <= within = #(<= hi); a finished bracket has lo == hi and stays
    is_left = up_to_first >= count
    is_middle = (up_to_first < count) & (up_to_second >= count)
    hi = tl.where(is_left, first, tl.where(is_middle, second, hi))
    within = tl.where(is_left, up_to_first, tl.where(is_middle, up_to_second, within))
    lo = tl.where(is_left, lo, tl.where(is_middle, first, second) + 1)
    below = tl.where(is_left, below, tl.where(is_middle, up_to_first, up_to_second))
    return tl.where(within == count, hi, lo), hi, below, within


@triton.jit
def _row_keys(
    weight_ptr,
    norm_ptr,
    reference_ptr,
    weight_row,  # [BLOCK_M, 1] int64 offsets of the rows
    reference_row,
    in_rows,  # [BLOCK_M, 1] bool
    start,
    N,
    stride_wn,
    stride_rn,
    HAS_REFERENCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    in_cols = cols < N
    wide = cols.to(tl.int64)
    return score_keys(
        weight_ptr,
        norm_ptr,
        reference_ptr,
        weight_row + wide * stride_wn,
        reference_row + wide * stride_rn,
        cols,
        in_rows & in_cols,
        in_cols,
        HAS_REFERENCE,
    )


# what changes from call to call must not compile anew
@triton.jit(do_not_specialize=["count"])
def _prune_rows_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    mask_ptr,  # [M, ceil(N / 8)] uint8
    spoiled_ptr,  # [1] int64, += rows with a score that is not finite
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    count,
    quantile,  # float32: wanted quantile / mean of a half normal, over N
    INVERT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TO_MASK: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    weight_row = rows[:, None] * stride_wm
    reference_row = rows[:, None] * stride_rm
    lanes = tl.arange(0, BLOCK_N)[None, :]

    if RESIDENT:
        key = _row_keys(
            weight_ptr, norm_ptr, reference_ptr, weight_row, reference_row, in_rows, 0, N, stride_wn, stride_rn,
            HAS_REFERENCE, BLOCK_N,
        )  # fmt: skip
        lo = tl.min(key, axis=1)
        hi = tl.max(tl.where(lanes < N, key, 0), axis=1)
        mean = tl.sum(tl.where(lanes < N, key, 0).to(tl.float32, bitcast=True), axis=1)
    else:
        least = tl.full([BLOCK_M, BLOCK_N], OUTSIDE, tl.int32)
        most = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            key = _row_keys(
                weight_ptr, norm_ptr, reference_ptr, weight_row, reference_row, in_rows, start, N, stride_wn, stride_rn,
                HAS_REFERENCE, BLOCK_N,
            )  # fmt: skip
            least = tl.minimum(least, key)
            key = tl.where(start + lanes < N, key, 0)
            most = tl.maximum(most, key)
            total += key.to(tl.float32, bitcast=True)
        lo = tl.min(least, axis=1)
        hi = tl.max(most, axis=1)
        mean = tl.sum(total, axis=1)

    spoiled = hi >= FINITE
    tl.atomic_add(spoiled_ptr, tl.sum(spoiled.to(tl.int64), axis=0), mask=tl.max(spoiled.to(tl.int32), axis=0) > 0)
    hi = tl.where(count == 0, -1, hi)
    lo = tl.where(spoiled | (count == 0) | (count == N), hi, lo)
    below = tl.zeros([BLOCK_M], tl.int32)
    within = tl.zeros([BLOCK_M], tl.int32) + tl.where(count == 0, 0, N)

    turn = 0
    while tl.max(hi - lo, axis=0) > 0:
        first, second = _probes(lo, hi, below, within, count, turn, True)
        if turn == 0:
            first = lo
            second = tl.maximum(tl.minimum((mean * quantile).to(tl.int32, bitcast=True), hi - 1), lo)
        if RESIDENT:
            up_to_first = tl.sum((key <= first[:, None]).to(tl.int32), axis=1)
            up_to_second = tl.sum((key <= second[:, None]).to(tl.int32), axis=1)
        else:
            left = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            right = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for start in range(0, N, BLOCK_N):
                key = _row_keys(
                    weight_ptr, norm_ptr, reference_ptr, weight_row, reference_row, in_rows, start, N, stride_wn,
                    stride_rn, HAS_REFERENCE, BLOCK_N,
                )  # fmt: skip
                left += (key <= first[:, None]).to(tl.int32)
                right += (key <= second[:, None]).to(tl.int32)
            up_to_first = tl.sum(left, axis=1)
            up_to_second = tl.sum(right, axis=1)
        lo, hi, below, within = _narrow(lo, hi, below, within, count, first, second, up_to_first, up_to_second)
        turn += 1

    # the last column whose tie belongs to the low set; all of them do unless more entries are <= threshold than wanted
    threshold = hi
    quota = count - below
    last = tl.zeros([BLOCK_M], tl.int32) + (N - 1)
    is_partial = (within > count) & (spoiled == 0)
    lo = tl.where(is_partial, 0, last)
    hi = last
    ties = within - below
    quota = tl.where(is_partial, quota, ties)
    within = ties
    below = tl.zeros([BLOCK_M], tl.int32)
    turn = 0
    while tl.max(hi - lo, axis=0) > 0:
        first, second = _probes(lo, hi, below, within, quota, turn, False)
        if RESIDENT:
            tie = key == threshold[:, None]
            up_to_first = tl.sum((tie & (lanes <= first[:, None])).to(tl.int32), axis=1)
            up_to_second = tl.sum((tie & (lanes <= second[:, None])).to(tl.int32), axis=1)
        else:
            left = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            right = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for start in range(0, N, BLOCK_N):
                key = _row_keys(
                    weight_ptr, norm_ptr, reference_ptr, weight_row, reference_row, in_rows, start, N, stride_wn,
                    stride_rn, HAS_REFERENCE, BLOCK_N,
                )  # fmt: skip
                tie = key == threshold[:, None]
                left += (tie & (start + lanes <= first[:, None])).to(tl.int32)
                right += (tie & (start + lanes <= second[:, None])).to(tl.int32)
            up_to_first = tl.sum(left, axis=1)
            up_to_second = tl.sum(right, axis=1)
        lo, hi, below, within = _narrow(lo, hi, below, within, quota, first, second, up_to_first, up_to_second)
        turn += 1
    last = hi

    for start in range(0, N, BLOCK_N):
        if not RESIDENT:
            key = _row_keys(
                weight_ptr, norm_ptr, reference_ptr, weight_row, reference_row, in_rows, start, N, stride_wn, stride_rn,
                HAS_REFERENCE, BLOCK_N,
            )  # fmt: skip
        cols = start + lanes
        low = (key < threshold[:, None]) | ((key == threshold[:, None]) & (cols <= last[:, None]))
        inside = in_rows & (cols < N)
        removed = (low != INVERT) & (spoiled == 0)[:, None] & inside
        if TO_MASK:
            store_bits(mask_ptr, removed, rows, start, M, N, BLOCK_M, BLOCK_N)
        else:
            wide = cols.to(tl.int64)
            remove_in_place(
                weight_ptr,
                reference_ptr,
                weight_row + wide * stride_wn,
                reference_row + wide * stride_rn,
                removed,
                inside,
                HAS_REFERENCE,
            )


@triton.jit
def _earlier(key, place, other):
    # 1 where the group's entry at place `other` comes before an entry in the order (key, place)
    at = tl.sum(tl.where(place == other, key, 0), axis=1)[:, None]
    return ((at < key) | ((at == key) & (other < place))).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _prune_groups_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    mask_ptr,  # [M, ceil(N / 8)] uint8 bits where m is a power of two, else [M, N] uint8 flags
    spoiled_ptr,  # [1] int64, += groups with a score that is not finite
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    n,
    m: tl.constexpr,
    WIDTH: tl.constexpr,  # smallest power of two >= m
    INVERT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TO_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,  # lanes, a multiple of WIDTH and of 8
):
    # tiles of all rows are numbered in one grid axis: the others end at 65,535
    GROUPS: tl.constexpr = BLOCK_N // WIDTH
    tiles = tl.cdiv(N, GROUPS * m)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * (GROUPS * m)
    place = tl.arange(0, WIDTH)[None, :]
    if m == WIDTH:
        # loaded as one line, so that vectors may span groups
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < N
    else:
        cols = start + tl.arange(0, GROUPS)[:, None] * m + place
        inside = (cols < N) & (place < m)
    weight_at = row * stride_wm + cols.to(tl.int64) * stride_wn
    reference_at = row * stride_rm + cols.to(tl.int64) * stride_rn
    key = score_keys(weight_ptr, norm_ptr, reference_ptr, weight_at, reference_at, cols, inside, inside, HAS_REFERENCE)
    key = tl.reshape(key, [GROUPS, WIDTH])
    in_groups = tl.reshape(inside, [GROUPS, WIDTH])

    spoiled = tl.max(tl.where(in_groups, key, 0), axis=1) >= FINITE
    rank = tl.zeros([GROUPS, WIDTH], tl.int32)
    if m <= 8:
        for other in tl.static_range(m):
            rank += _earlier(key, place, other)
    else:
        for other in range(m):
            rank += _earlier(key, place, other)
    removed = ((rank < n) != INVERT) & (spoiled == 0)[:, None] & in_groups
    many = tl.sum(spoiled.to(tl.int64), axis=0)
    tl.atomic_add(spoiled_ptr, many, mask=many > 0)
    if m == WIDTH:
        removed = tl.reshape(removed, [BLOCK_N])
        if TO_MASK:
            store_bits(mask_ptr, tl.reshape(removed, [1, BLOCK_N]), row + tl.arange(0, 1), start, M, N, 1, BLOCK_N)
    elif TO_MASK:
        tl.store(mask_ptr + row * N + cols, removed.to(tl.uint8), mask=inside)
    if not TO_MASK:
        remove_in_place(weight_ptr, reference_ptr, weight_at, reference_at, removed, inside, HAS_REFERENCE)


@triton.jit
def _pack_kernel(flags_ptr, mask_ptr, M, N, BLOCK_N: tl.constexpr):  # [M, N] uint8 to [M, ceil(N / 8)] uint8
    tiles = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) + tl.arange(0, 1)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    removed = tl.load(flags_ptr + rows[:, None] * N + cols, mask=cols < N, other=0) != 0
    store_bits(mask_ptr, removed, rows, start, M, N, 1, BLOCK_N)


def prune_rows(
    weight: Tensor, norm: Tensor, reference: Tensor | None, count: int, invert: bool, mask: Tensor | None
) -> int:
    """Removes in place, or writes the mask; returns how many rows have a score that is not finite."""
    M, N = weight.shape
    if M * N == 0:
        return 0
    if mask is None and nonfinite(weight, norm, reference):
        mask = empty_mask(weight)  # to count them, and leave the weights alone
    tile = launch.row_tile(M, N, weight.stride(0), weight.stride(1), weight.element_size())
    spoiled = torch.zeros(1, dtype=torch.int64, device=weight.device)
    share = min(max(count / N, 1 / 512), 511 / 512)
    half_normal = statistics.NormalDist().inv_cdf((1 + share) / 2) * math.sqrt(math.pi / 2)
    _prune_rows_kernel[(triton.cdiv(M, tile.block_m),)](
        *arguments(weight, norm, reference, weight if mask is None else mask, spoiled),
        count,
        half_normal / N,
        INVERT=invert,
        HAS_REFERENCE=reference is not None,
        TO_MASK=mask is not None,
        RESIDENT=tile.block_n >= N,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    return int(spoiled)


def prune_groups(
    weight: Tensor, norm: Tensor, reference: Tensor | None, n: int, m: int, invert: bool, mask: Tensor | None
) -> int:
    """Removes in place, or writes the mask; returns how many groups have a score that is not finite."""
    M, N = weight.shape
    if M * N == 0:
        return 0
    if mask is None and nonfinite(weight, norm, reference):
        mask = empty_mask(weight)  # to count them, and leave the weights alone
    tile = launch.group_tile(N)
    width = launch.power_of_two(m)
    flags = None if mask is None or width == m else torch.empty((M, N), dtype=torch.uint8, device=weight.device)
    output = next(tensor for tensor in (flags, mask, weight) if tensor is not None)
    spoiled = torch.zeros(1, dtype=torch.int64, device=weight.device)
    _prune_groups_kernel[(M * triton.cdiv(N, tile.block_n // width * m),)](
        *arguments(weight, norm, reference, output, spoiled),
        n,
        m=m,
        WIDTH=width,
        INVERT=invert,
        HAS_REFERENCE=reference is not None,
        TO_MASK=mask is not None,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    if flags is not None:
        _pack_kernel[(M * triton.cdiv(N, tile.block_n),)](
            flags, mask, M, N, BLOCK_N=tile.block_n, num_warps=tile.num_warps, **launch.EXACT
        )
    return int(spoiled)
