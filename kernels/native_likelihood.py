"""Log-likelihoods of labels and their gradients by the native library; what it has not (float64, a soft cap) is `likelihood.py`'s.

A band of logits is a product along the features that lies in the cache, the tokens adjacent, and is reduced there. Where the processor
multiplies pairs of bfloat16 (AVX512-BF16), bfloat16 inputs are not widened; sums are float32 all the same.
"""

import torch
from torch import Tensor

from hftcore.kernels import native
from hftcore.kernels.likelihood import scratch

COLUMNS = 192  # of the vocabulary, the least that are worth a product


def serves(rows: Tensor, head: Tensor, soft_cap: float | None) -> bool:
    """Whether the library takes these and is faster than PyTorch here. A head of another layout would have to be copied."""
    return soft_cap is None and head.stride(1) == 1 and native.multiplies(rows, head)


def token_logprobs(
    rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, soft_cap: None = None
) -> tuple[Tensor, Tensor]:
    """As that of `likelihood.py`; the same bits whatever the thread count."""
    greatest, total, chosen = native.softmax_parts(rows, head, target, bias)
    peak = greatest.amax(dim=0)
    every = total.mul_((greatest - peak).exp_()).sum(dim=0, dtype=torch.float64)
    lse = peak.double() + every.log()
    return chosen - lse, lse


def token_gradients(
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    soft_cap: None,
    lse: Tensor,
    coefficient: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As that of `likelihood.py`."""
    to_rows, to_head, to_bias = wanted
    d_rows = rows.new_zeros(rows.shape, dtype=torch.float32) if to_rows else None
    d_head = torch.empty_like(head) if to_head else None
    d_bias = torch.empty_like(bias) if to_bias and bias is not None else None
    # where there are units for pairs of bfloat16, the gradient of a logit is rounded to it, as autograd does
    is_rounded = rows.dtype == torch.bfloat16 and native.simd() == "avx512bf16"
    columns = max(COLUMNS, scratch(rows, head) // max(1, len(rows)))
    for start in range(0, len(head), columns):
        part = slice(start, start + columns)
        gradient = native.logit_gradients(
            rows, head[part], target - start, None if bias is None else bias[part], lse, coefficient
        )
        factor = gradient.bfloat16() if is_rounded else gradient
        if d_rows is not None:
            # the sum over the vocabulary is one over "tokens" of a single sample
            d_rows += native.direct_with_gradient(head[part][None], factor[None])[1]
        if d_head is not None and is_rounded:
            torch.mm(factor, rows, out=d_head[part])  # rounded once, like this one
        elif d_head is not None:
            d_head[part] = native.direct_with_gradient(rows[None], factor.T[None])[1]
        if d_bias is not None:
            d_bias[part] = gradient.sum(dim=1)
    return None if d_rows is None else d_rows.to(rows.dtype), d_head, d_bias
