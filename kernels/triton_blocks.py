"""Triton kernel of block scores: sums whose order is fixed, so that every backend rounds them alike.

A program sums some neighbouring blocks of one row of blocks, a few columns of each at a time. The columns of such a tile lie in
different threads; each is handed to its block's running sum by a reduction with zeros in all other places, which is exact, and the
sums themselves go on in row-major order in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import launch
from hftcore.kernels.triton_score import arguments, score_keys


@triton.jit
def _block_scores_kernel(
    weight_ptr,  # [M, N] any float dtype
    norm_ptr,  # [N] float32
    reference_ptr,  # [M, N] dtype of weight
    scores_ptr,  # [M / bm, N / bn] float32
    M,
    N,
    stride_wm,
    stride_wn,
    stride_rm,
    stride_rn,
    bm,
    bn: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    across = N // bn
    tiles = tl.cdiv(across, BLOCKS)
    top = (tl.program_id(0) // tiles).to(tl.int64)
    blocks = (tl.program_id(0) % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    places = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([BLOCKS], tl.float64)
    for i in range(bm):
        row = top * bm + i
        for start in range(0, bn, WIDTH):
            cols = blocks[:, None] * bn + start + places
            inside = (blocks < across)[:, None] & (start + places < bn)
            wide = cols.to(tl.int64)
            key = score_keys(
                weight_ptr, norm_ptr, reference_ptr, row * stride_wm + wide * stride_wn,
                row * stride_rm + wide * stride_rn, cols, inside, inside, HAS_REFERENCE,
            )  # fmt: skip
            score = tl.where(inside, key.to(tl.float32, bitcast=True), 0.0)
            for place in tl.static_range(0, WIDTH):
                one = tl.sum(tl.where(places == place, score, 0.0), axis=1).to(tl.float64)
                total += one * one
    tl.store(scores_ptr + top * across + blocks, total.to(tl.float32), mask=blocks < across)


def block_scores(weight: Tensor, norm: Tensor, reference: Tensor | None, bm: int, bn: int) -> Tensor:
    """[M / bm, N / bn] float32: the sum of squared scores of each block."""
    M, N = weight.shape
    scores = torch.empty((M // bm, N // bn), dtype=torch.float32, device=weight.device)
    if scores.numel() == 0:
        return scores
    tile = launch.block_tile(bn)
    _block_scores_kernel[(scores.shape[0] * triton.cdiv(scores.shape[1], tile.blocks),)](
        *arguments(weight, norm, reference, scores),
        bm,
        bn,
        HAS_REFERENCE=reference is not None,
        BLOCKS=tile.blocks,
        WIDTH=tile.width,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    return scores
