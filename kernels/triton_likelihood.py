r"""Log-likelihoods of labels under an output head and their gradients, fused: logits live only on the chip.

    z = rows @ head.T + bias;   y = soft_cap * tanh(z / soft_cap);   logprob[s] = y[s, target[s]] - log Σ_v exp(y[s, v])

A program takes BLOCK_T tokens and a stripe of the vocabulary: one [BLOCK_T, BLOCK_V] tile of logits after another by tl.dot, folded
into a running maximum and a running sum of exponentials, both float32. The stripes' results, 8 bytes a token and stripe, are joined in
float64 by the launcher. Programs that share a stripe are neighbours, so the head is read from memory about once. Float32 inputs are
multiplied in float32 (no TF32): a likelihood sums hundreds of such logits.

The backward makes the gradient of some columns' logits in one kernel, and leaves its products with head and rows to the library of
matrix products that PyTorch has for the device.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hftcore.kernels import launch, likelihood

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def logit_tile(
    rows_ptr,
    head_ptr,
    bias_ptr,
    tokens,
    columns,
    in_tokens,
    in_columns,
    D,
    stride_hv,
    stride_hd,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        in_features = features < D
        x_at = rows_ptr + tokens[:, None] * D + features[None, :]
        x = tl.load(x_at, mask=in_tokens[:, None] & in_features[None, :], other=0.0)
        w_at = head_ptr + columns[None, :] * stride_hv + features[:, None].to(tl.int64) * stride_hd
        w = tl.load(w_at, mask=in_columns[None, :] & in_features[:, None], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        # tanh by one exponential; where it overflows the quotient is 0 and tanh 1
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / soft_cap) + 1.0))
    return logits


@triton.jit
def logprob_kernel(
    rows_ptr,  # [S, D] any float dtype, contiguous
    head_ptr,  # [V, D] dtype of rows
    bias_ptr,  # [V] any float dtype, or rows_ptr
    target_ptr,  # [S] int64
    peak_ptr,  # [stripes, S] float32: maximum of the stripe's logits
    total_ptr,  # [stripes, S] float32: sum of exp(logit - peak)
    chosen_ptr,  # [S] float32: the target's logit
    S,
    V,
    D,
    stride_hv,
    stride_hd,
    soft_cap,
    STRIPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tokens = tokens < S
    first = tl.program_id(1).to(tl.int64) * STRIPE
    target = tl.load(target_ptr + tokens, mask=in_tokens, other=-1)

    # not -inf: a stripe that a bias of -inf masks altogether must add 0, not NaN
    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    chosen = tl.zeros([BLOCK_T], tl.float32)
    # the last stripe may be short; a tile wholly outside adds nothing
    for offset in range(0, STRIPE, BLOCK_V):
        columns = first + offset + tl.arange(0, BLOCK_V)
        in_columns = columns < V
        logits = logit_tile(
            rows_ptr,
            head_ptr,
            bias_ptr,
            tokens,
            columns,
            in_tokens,
            in_columns,
            D,
            stride_hv,
            stride_hd,
            soft_cap,
            HAS_BIAS,
            CAPPED,
            WIDEN,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        chosen += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), axis=1)
        logits = tl.where(in_columns[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - highest) + tl.sum(tl.exp(logits - highest[:, None]), axis=1)
        peak = highest

    stripe_at = tl.program_id(1).to(tl.int64) * S + tokens
    tl.store(peak_ptr + stripe_at, peak, mask=in_tokens)
    tl.store(total_ptr + stripe_at, total, mask=in_tokens)
    # exactly one stripe holds the target
    tl.store(chosen_ptr + tokens, chosen, mask=in_tokens & (target >= first) & (target < first + STRIPE))


@triton.jit
def logit_gradient_kernel(
    rows_ptr,  # [S, D] any float dtype, contiguous
    head_ptr,  # [V, D] dtype of rows: some rows of the head
    bias_ptr,  # [V] any float dtype, or rows_ptr
    target_ptr,  # [S] int64, counted from the first of those rows
    lse_ptr,  # [S] float32: log of the sum of exponentials over the whole vocabulary
    coefficient_ptr,  # [S] float32
    out_ptr,  # [S, V] any float dtype: coefficient * ([v is the target] - exp(logit - lse)), of the logit before the cap
    S,
    V,
    D,
    stride_hv,
    stride_hd,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tokens = tokens < S
    columns = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = columns < V
    logits = logit_tile(
        rows_ptr,
        head_ptr,
        bias_ptr,
        tokens,
        columns,
        in_tokens,
        in_columns,
        D,
        stride_hv,
        stride_hd,
        soft_cap,
        HAS_BIAS,
        CAPPED,
        WIDEN,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    target = tl.load(target_ptr + tokens, mask=in_tokens, other=-1)
    lse = tl.load(lse_ptr + tokens, mask=in_tokens, other=0.0)
    coefficient = tl.load(coefficient_ptr + tokens, mask=in_tokens, other=0.0)
    gradient = tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - tl.exp(logits - lse[:, None])
    gradient *= coefficient[:, None]
    if CAPPED:
        tanh = logits / soft_cap
        gradient *= 1.0 - tanh * tanh
    out_at = out_ptr + tokens[:, None] * V + columns[None, :]
    tl.store(out_at, gradient.to(out_ptr.dtype.element_ty), mask=in_tokens[:, None] & in_columns[None, :])


def token_logprobs(
    rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Launch `logprob_kernel`. Arguments and results are those of `likelihood.token_logprobs`."""
    rows = rows.contiguous()
    S, D = rows.shape
    V = head.shape[0]
    tile = launch.logit_tile(rows.element_size())
    stripes = triton.cdiv(V, launch.STRIPE)
    peak = torch.empty((stripes, S), dtype=torch.float32, device=rows.device)
    total = torch.empty_like(peak)
    chosen = torch.empty(S, dtype=torch.float32, device=rows.device)
    if S:
        logprob_kernel[(triton.cdiv(S, tile.block_m), stripes)](
            rows,
            head,
            rows if bias is None else bias.contiguous(),
            target,
            peak,
            total,
            chosen,
            S,
            V,
            D,
            *head.stride(),
            1.0 if soft_cap is None else float(soft_cap),
            STRIPE=launch.STRIPE,
            **_options(rows, bias, soft_cap, tile),
        )
    lse = (peak.double() + total.double().log()).logsumexp(dim=0)
    return chosen.double() - lse, lse


def logit_gradients(
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    soft_cap: float | None,
    lse: Tensor,
    coefficient: Tensor,
    out: Tensor,
) -> None:
    """Launch `logit_gradient_kernel`."""
    S, D = rows.shape
    V = head.shape[0]
    tile = launch.logit_gradient_tile(rows.element_size())
    logit_gradient_kernel[(triton.cdiv(S, tile.block_m), triton.cdiv(V, tile.block_n))](
        rows,
        head,
        rows if bias is None else bias.contiguous(),
        target,
        lse,
        coefficient,
        out,
        S,
        V,
        D,
        *head.stride(),
        1.0 if soft_cap is None else float(soft_cap),
        **_options(rows, bias, soft_cap, tile),
    )


def _options(rows: Tensor, bias: Tensor | None, soft_cap: float | None, tile: launch.ProductTile) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "HAS_BIAS": bias is not None,
        "CAPPED": soft_cap is not None,
        "WIDEN": rows.device.type == "cpu",  # the interpreter multiplies the bit patterns of bfloat16 numbers
        "BLOCK_T": tile.block_m,
        "BLOCK_V": tile.block_n,
        "BLOCK_D": tile.block_k,
        "num_warps": tile.num_warps,
    }


# the products with head and rows are those of plain PyTorch
token_gradients = partial(likelihood.token_gradients, logit_gradients=logit_gradients)
