"""Log-likelihoods of labels under an output head, without the logits of all tokens: their meaning, and plain PyTorch.

    z = rows @ head.T + bias;   y = soft_cap * tanh(z / soft_cap);   logprob[s] = y[s, target[s]] - log Σ_v exp(y[s, v])

The `reference_*` functions are the meaning: float64, every logit at once. The others walk [TOKENS, columns] tiles of the logits,
vocabulary outermost, so that a tile stays in the processor's cache while it is used and the head is read once. The logits are
float32 products of the inputs as they are (float64 for float64 inputs): they are never rounded to bfloat16.

Contract: `rows` [S, D] and `head` [V, D] of one dtype (float32, bfloat16, float16 or float64), `target` [S] int64 in 0..V-1,
`bias` [V] any float dtype or None, `soft_cap` positive or None; all on one device. NaN and infinity come out as such.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hftcore.kernels.products import accumulator, add_product, fast_products, multiply

TOKENS = 512  # rows of a tile
# elements of a tile and of the widened head beside it. The more columns, the less the rows are packed anew for each product; but
# no more than a 96th of the logits, if these are not few, and no more than lies in a level-3 cache
SCRATCH = 1 << 18, 1 << 21
SHARE = 96
LARGE_SCRATCH = 1 << 24  # on other devices: 64 MiB, enough to fill one
LOG2E = 1.4426950408889634


def reference_logits(rows: Tensor, head: Tensor, bias: Tensor | None, soft_cap: float | None) -> Tensor:
    """[S, V] float64."""
    logits = rows.double() @ head.double().T
    if bias is not None:
        logits = logits + bias.double()
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def reference_logprobs(
    rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, soft_cap: float | None
) -> Tensor:
    """[S] float64; differentiable."""
    every = reference_logits(rows, head, bias, soft_cap).log_softmax(dim=-1)
    return every.gather(1, target[:, None])[:, 0]


class _Tiles:
    """The logits of `rows`, one tile at a time in one buffer: vocabulary outside, tokens inside."""

    def __init__(self, rows: Tensor, head: Tensor, bias: Tensor | None, soft_cap: float | None) -> None:
        self.head, self.bias, self.soft_cap = head, bias, soft_cap
        self.dtype = accumulator(rows.dtype)
        # tensor cores give float32 products of narrow factors; elsewhere rows and each part of the head are widened once
        self.factor = rows.dtype if rows.device.type == "cuda" else self.dtype
        self.rows = rows.to(self.factor)
        self.tokens = max(1, min(TOKENS, rows.shape[0]))
        each = self.tokens + (0 if head.dtype == self.factor else head.shape[1])
        self.columns = min(head.shape[0], max(1, scratch(rows, head) // each))
        self.buffer = rows.new_empty(self.tokens * self.columns, dtype=self.dtype)

    def bands(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """First column, head [columns, D] and bias [columns] of each part of the vocabulary."""
        for start in range(0, self.head.shape[0], self.columns):
            part = slice(start, start + self.columns)
            bias = None if self.bias is None else self.bias[part].to(self.dtype)
            yield start, self.head[part].to(self.factor), bias

    def blocks(self) -> Iterator[slice]:
        count = self.rows.shape[0]
        return (slice(start, min(start + self.tokens, count)) for start in range(0, count, self.tokens))

    def logits(self, block: slice, head: Tensor, bias: Tensor | None) -> Tensor:
        """[block, columns], valid until the next call."""
        tokens, columns = block.stop - block.start, head.shape[0]
        tile = self.buffer[: tokens * columns].view(tokens, columns)
        multiply(self.rows[block], head.T, tile)
        if bias is not None:
            tile += bias
        if self.soft_cap is not None:
            tile.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return tile

    def gradients(
        self, block: slice, head: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, coefficient: Tensor
    ) -> Tensor:
        """Of those logits, [block, columns] in the dtype of factors; `target` counts from the first of the columns."""
        tile = self.logits(block, head, bias)
        slope = None if self.soft_cap is None else (tile / self.soft_cap).square_().neg_().add_(1)
        column, here = _place(target, 0, tile.shape[1])
        # d logprob / d y = [v is the target] - exp(y - lse)
        _exponentials(tile, lse[:, None]).neg_().scatter_add_(1, column, here.to(tile.dtype)).mul_(coefficient[:, None])
        if slope is not None:
            tile *= slope
        return tile.to(self.factor)


def scratch(rows: Tensor, head: Tensor) -> int:
    """Elements of the logits that may exist at a time."""
    if rows.device.type != "cpu":
        return LARGE_SCRATCH
    least, most = SCRATCH
    return min(most, max(least, rows.shape[0] * head.shape[0] // SHARE))


def _exponentials(tile: Tensor, offset: Tensor) -> Tensor:
    """exp(tile - offset), in place: by powers of two, which PyTorch makes several times as fast on a CPU, above all where they vanish."""
    return tile.sub_(offset).mul_(LOG2E).exp2_()


def _place(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a band [S, 1], and whether it lies there [S, 1]."""
    column = (target - start)[:, None]
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns)


def token_logprobs(
    rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each target and the log of each row's sum of exponentials, [S] float64 each."""
    tiles = _Tiles(rows, head, bias, soft_cap)
    # not -inf: a part of the vocabulary that a bias of -inf masks altogether must add 0, not NaN
    lowest = torch.finfo(tiles.dtype).min
    peak = torch.full((rows.shape[0], 1), lowest, dtype=tiles.dtype, device=rows.device)
    total = torch.zeros_like(peak, dtype=torch.float64)
    chosen = torch.zeros_like(peak)
    with fast_products(rows.dtype, rows.device):
        for start, head_band, bias_band in tiles.bands():
            for block in tiles.blocks():
                tile = tiles.logits(block, head_band, bias_band)
                column, here = _place(target[block], start, tile.shape[1])
                chosen[block] = torch.where(here, tile.gather(1, column), chosen[block])
                highest = torch.maximum(peak[block], tile.amax(dim=1, keepdim=True))
                part = _exponentials(tile, highest).sum(dim=1, keepdim=True)
                total[block] = total[block] * (peak[block] - highest).exp() + part
                peak[block] = highest
    lse = peak.double() + total.log()
    return (chosen - lse)[:, 0], lse[:, 0]


def token_gradients(
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    soft_cap: float | None,
    lse: Tensor,
    coefficient: Tensor,
    wanted: tuple[bool, bool, bool],
    logit_gradients: Callable[..., None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ_s coefficient[s] · logprob[s] to rows, head and bias; None where not wanted.

    `lse` [S] is what `token_logprobs` returned; the logits are computed again, tile by tile. Sums over tokens and over the vocabulary
    are float32 or better and rounded once to the dtype of what they belong to. The gradient of a logit is rounded to the inputs'
    dtype before it is multiplied where the machine has units for that dtype, as autograd does. `logit_gradients(rows, head, target, bias,
    soft_cap, lse, coefficient, out)` makes those of some tokens and some rows of the head in place of plain PyTorch.
    """
    tiles = _Tiles(rows, head, bias, soft_cap)
    to_rows, to_head, to_bias = wanted
    lse, coefficient = lse.to(tiles.dtype), coefficient.to(tiles.dtype)
    d_rows = torch.zeros(rows.shape, dtype=tiles.dtype, device=rows.device) if to_rows else None
    d_head = torch.zeros_like(head) if to_head else None
    d_bias = torch.zeros_like(bias) if to_bias and bias is not None else None
    with fast_products(rows.dtype, rows.device):
        for start, head_band, bias_band in tiles.bands():
            part = slice(start, start + head_band.shape[0])
            head_sum = torch.zeros(head_band.shape, dtype=tiles.dtype, device=rows.device) if to_head else None
            bias_sum = torch.zeros(head_band.shape[0], dtype=tiles.dtype, device=rows.device) if to_bias else None
            for block in tiles.blocks():
                of_tokens = lse[block], coefficient[block]
                if logit_gradients is None:
                    factor = tiles.gradients(block, head_band, bias_band, target[block] - start, *of_tokens)
                else:
                    some = tiles.rows[block]
                    factor = some.new_empty(some.shape[0], head_band.shape[0])
                    logit_gradients(some, head_band, target[block] - start, bias_band, soft_cap, *of_tokens, factor)
                if d_rows is not None:
                    add_product(d_rows[block], factor, head_band)
                if head_sum is not None:
                    add_product(head_sum, factor.T, tiles.rows[block])
                if bias_sum is not None:
                    bias_sum += factor.sum(dim=0, dtype=tiles.dtype)
            if d_head is not None and head_sum is not None:
                d_head[part] = head_sum
            if d_bias is not None and bias_sum is not None:
                d_bias[part] = bias_sum
    return None if d_rows is None else d_rows.to(rows.dtype), d_head, d_bias
