"""Triton kernel of the column energy: Σ over kept tokens of x², one read of x.

A program takes one strip of columns and one run of tokens. Sums over at most 64 tokens are float32, as the squares of bfloat16
and float16 values are almost exact there; these partial sums are added in float64, in the order of the tokens, and so are the
programs' sums. Nothing is atomic and the tiles depend on the shape alone, so the same input gives the same bits. Rows that
do not count are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import launch


@triton.jit
def _column_energy_kernel(
    x_ptr,  # [T, N] any float dtype
    keep_ptr,  # [T] bool
    partial_ptr,  # [ceil(T / TOKENS), N] float64
    T,
    N,
    stride_xt,
    stride_xn,
    stride_k,
    HAS_KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    strips = tl.cdiv(N, BLOCK_N)
    run = (tl.program_id(0) // strips).to(tl.int64)
    cols = (tl.program_id(0) % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    x_column = cols.to(tl.int64)[None, :] * stride_xn
    total = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, TOKENS, BLOCK_T):
        tokens = run * TOKENS + start + tl.arange(0, BLOCK_T)
        counted = tokens < T
        if HAS_KEEP:
            counted = tl.load(keep_ptr + tokens * stride_k, mask=counted, other=0) != 0
        x = tl.load(x_ptr + tokens[:, None] * stride_xt + x_column, mask=counted[:, None] & in_cols[None, :], other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x * x, axis=0).to(tl.float64)
    tl.store(partial_ptr + run * N + cols, total, mask=in_cols)


@triton.jit
def _combine_kernel(partial_ptr, energy_ptr, runs, N, BLOCK_N: tl.constexpr):  # [runs, N] float64 to [N] float32
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    total = tl.zeros([BLOCK_N], tl.float64)
    for _ in range(runs):
        total += tl.load(partial_ptr + cols, mask=in_cols, other=0.0)
        partial_ptr += N
    tl.store(energy_ptr + cols, total.to(tl.float32), mask=in_cols)


def column_energy(x: Tensor, keep: Tensor | None) -> Tensor:
    """[N] float32: Σ of squares over kept tokens."""
    T, N = x.shape
    if T * N == 0:
        return torch.zeros(N, dtype=torch.float32, device=x.device)
    tile = launch.energy_tile(T, N)
    runs = triton.cdiv(T, tile.tokens)
    partial = torch.empty((runs, N), dtype=torch.float64, device=x.device)
    energy = torch.empty(N, dtype=torch.float32, device=x.device)
    _column_energy_kernel[(runs * triton.cdiv(N, tile.block_n),)](
        x,
        x if keep is None else keep,
        partial,
        T,
        N,
        *x.stride(),
        0 if keep is None else keep.stride(0),
        HAS_KEEP=keep is not None,
        TOKENS=tile.tokens,
        BLOCK_T=tile.block_t,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **launch.EXACT,
    )
    _combine_kernel[(triton.cdiv(N, launch.COMBINE),)](
        partial, energy, runs, N, BLOCK_N=launch.COMBINE, num_warps=1, **launch.EXACT
    )
    return energy
