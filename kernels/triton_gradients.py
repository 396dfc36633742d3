r"""Triton kernels of the per-sample squared gradient norm, on tensor cores.

    ghost    a program holds one tile of x x^T and the same tile of g g^T in registers and adds up their products
    direct   a program holds one tile of g^T x in registers and adds up its squares

Of the ghost form only tiles on or below the diagonal are made; those below count twice. Neither a T x T nor an M x N matrix
reaches device memory: each program writes one float32, and these are summed in a fixed order, so the same input gives the same bits.
A tile is summed in one reduction: Triton 3.6 fails on Blackwell when two follow a bfloat16 product.
float16 and bfloat16 go into the products as they are, float32 without rounding to TF32; sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import gradients, launch


@triton.jit
def _gram_tile(
    base_ptr,  # [T, N] one sample
    rows,  # [BLOCK_T]
    columns,  # [BLOCK_T]
    T,
    N,
    stride_t,
    stride_n,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < N
        left_at = rows.to(tl.int64)[:, None] * stride_t + k.to(tl.int64)[None, :] * stride_n
        right_at = columns.to(tl.int64)[None, :] * stride_t + k.to(tl.int64)[:, None] * stride_n
        left = tl.load(base_ptr + left_at, mask=(rows < T)[:, None] & in_k[None, :], other=0.0)
        right = tl.load(base_ptr + right_at, mask=in_k[:, None] & (columns < T)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _ghost_kernel(
    x_ptr,  # [B, T, N] any float dtype
    g_ptr,  # [B, T, M] any float dtype
    partial_ptr,  # [B, tiles of the lower triangle] float32
    T,
    N,
    M,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_gb,
    stride_gt,
    stride_gm,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    # tile = row (row + 1) / 2 + column; the float root can be one off near a whole number
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_T + tl.arange(0, BLOCK_T)
    a = _gram_tile(x_ptr + sample * stride_xb, rows, columns, T, N, stride_xt, stride_xn, BLOCK_T, BLOCK_K)
    c = _gram_tile(g_ptr + sample * stride_gb, rows, columns, T, M, stride_gt, stride_gm, BLOCK_T, BLOCK_K)
    times = tl.where(row == column, 1.0, 2.0)
    tl.store(partial_ptr + sample * tiles + tile, times * tl.sum(a * c))


@triton.jit
def _direct_kernel(
    x_ptr,  # [B, T, N] any float dtype
    g_ptr,  # [B, T, M] dtype of x
    partial_ptr,  # [B, tiles] float32
    T,
    N,
    M,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_gb,
    stride_gt,
    stride_gm,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(N, BLOCK_N)
    rows = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = x_ptr + sample * stride_xb + columns.to(tl.int64)[None, :] * stride_xn
    g_at = g_ptr + sample * stride_gb + rows.to(tl.int64)[:, None] * stride_gm
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        wide = t.to(tl.int64)
        left = tl.load(g_at + wide[None, :] * stride_gt, mask=(rows < M)[:, None] & (t < T)[None, :], other=0.0)
        right = tl.load(x_at + wide[:, None] * stride_xt, mask=(t < T)[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    tl.store(partial_ptr + sample * tiles + tile, tl.sum(acc * acc))


def grad_norms_sq(x: Tensor, g: Tensor) -> Tensor:
    """Launch the kernel whose form takes fewer operations. Arguments are as `hftcore.ops.grad_norms_sq` has checked them."""
    return ghost(x, g) if gradients.is_ghost(x.shape[1], g.shape[2], x.shape[2]) else direct(x, g)


def ghost(x: Tensor, g: Tensor) -> Tensor:
    x, g = _readable(x), _readable(g)
    B, T, N = x.shape
    tile = launch.gram_tile(T, max(x.element_size(), g.element_size()))
    side = triton.cdiv(T, tile.block_m)
    tiles = side * (side + 1) // 2
    partial = torch.empty(B, tiles, dtype=torch.float32, device=x.device)
    if partial.numel():
        _ghost_kernel[(tiles, B)](
            x,
            g,
            partial,
            T,
            N,
            g.shape[2],
            *x.stride(),
            *g.stride(),
            tiles,
            BLOCK_T=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
        )
    return partial.sum(dim=1).clamp_(min=0)


def direct(x: Tensor, g: Tensor) -> Tensor:
    B, T, N = x.shape
    M = g.shape[2]
    if x.dtype != g.dtype:
        x, g = x.float(), g.float()
    x, g = _readable(x), _readable(g)
    tile = launch.outer_tile(M, N, x.element_size())
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    partial = torch.empty(B, tiles, dtype=torch.float32, device=x.device)
    if partial.numel():
        _direct_kernel[(tiles, B)](
            x,
            g,
            partial,
            T,
            N,
            M,
            *x.stride(),
            *g.stride(),
            tiles,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_T=tile.block_k,
            num_warps=tile.num_warps,
        )
    return partial.sum(dim=1)


def _readable(x: Tensor) -> Tensor:
    # on the CPU this is Triton's interpreter, whose products take bfloat16 bits for integers
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
