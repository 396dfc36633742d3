r"""Per-sample squared gradient norms of matrices that multiply, or look up, tokens.

    direct   || g^T x ||_F^2              2 T M N operations a sample
    ghost    < x x^T, g g^T >             T^2 (M + N) with symmetry        (Li et al. 2022, arXiv:2110.05679, section 4)

for x [T, N] the inputs of one sample and g [T, M] the gradients of its outputs. Both forms are walked in blocks, so that neither a
T x T nor an M x N matrix of every sample exists; products and sums are float32 whatever the dtype (float64 stays float64).

The meanings come first; the implementations in plain PyTorch, for any device, follow.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of a temporary
TOKENS = 128  # of a block of the ghost form: smaller ones gain more from symmetry, and products of this size run at full speed


def reference_grad_norms_sq(x: Tensor, g: Tensor) -> Tensor:
    """squares[b] = sum over m, n of (sum over t of g[b, t, m] x[b, t, n])^2"""
    return torch.einsum("btm,btn->bmn", g, x).square().sum(dim=(1, 2))


def reference_embedding_grad_norms_sq(ids: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    """As `reference_grad_norms_sq` with x the one-hot rows of `ids`; the row `padding_idx` has no gradient."""
    x = torch.nn.functional.one_hot(ids).to(g.dtype)
    if padding_idx is not None and padding_idx < x.shape[2]:
        x[:, :, padding_idx] = 0
    return reference_grad_norms_sq(x, g)


def is_ghost(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    """Whether the ghost form takes fewer operations than the direct one; with the Gram matrix of x at hand only g g^T is left."""
    return T < 2 * N if has_gram else T * (M + N) < 2 * M * N


def grad_norms_sq(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    if is_ghost(x.shape[1], g.shape[2], x.shape[2], gram is not None):
        return ghost(x, g, gram)
    return direct(x, g)


def ghost(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    total = _zeros(x)
    for these, rows, columns, times in _tiles(x):
        a = _wide(x[these, rows]) @ _wide(x[these, columns]).mT if gram is None else gram[these, rows, columns]
        c = _wide(g[these, rows]) @ _wide(g[these, columns]).mT
        total[these] += times * c.mul_(a).sum(dim=(1, 2))
    # rounding can leave a tiny negative number where terms cancel; a NaN stays one
    return total.clamp_(min=0).float()


def direct(x: Tensor, g: Tensor) -> Tensor:
    total = _zeros(x)
    for these, wide, columns in _bands(x, g):
        total[these] += (_wide(g[these, :, columns]).mT @ wide).square_().sum(dim=(1, 2))
    return total.float()


def direct_with_gradient(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norms and the sum over samples of g^T x, [M, N]: each product serves both."""
    total = _zeros(x)
    gradient = torch.zeros(g.shape[2], x.shape[2], dtype=total.dtype, device=x.device)
    for these, wide, columns in _bands(x, g):
        product = _wide(g[these, :, columns]).mT @ wide
        gradient[columns] += product.sum(dim=0)
        total[these] += product.square_().sum(dim=(1, 2))
    return total.float(), gradient


def input_gram(x: Tensor) -> Tensor:
    """x x^T of every sample, [B, T, T]."""
    gram = torch.empty(x.shape[0], x.shape[1], x.shape[1], dtype=_zeros(x).dtype, device=x.device)
    for these, rows, columns, _ in _tiles(x):
        product = _wide(x[these, rows]) @ _wide(x[these, columns]).mT
        gram[these, rows, columns] = product
        gram[these, columns, rows] = product.mT
    return gram


def embedding_grad_norms_sq(ids: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    total = _zeros(g)
    step = _samples(g.shape[1] * g.shape[2])
    for start in range(0, ids.shape[0], step):
        these = slice(start, start + step)
        # float64: gradients of a repeated token may cancel, and the square of what is left would keep no digit in float32
        wide, tokens = g[these].double(), ids[these].long()
        if padding_idx is not None:
            wide = wide.masked_fill((tokens == padding_idx).unsqueeze(-1), 0)
        # one group for each pair of a sample and a token id
        sample = torch.arange(tokens.shape[0], device=ids.device).unsqueeze(1).expand_as(tokens)
        pairs, group = torch.stack((sample, tokens), -1).flatten(0, 1).unique(dim=0, return_inverse=True)
        sums = torch.zeros(pairs.shape[0], g.shape[2], dtype=torch.float64, device=g.device)
        sums.index_add_(0, group, wide.flatten(0, 1))
        total[these].index_add_(0, pairs[:, 0], sums.square_().sum(dim=1).to(total.dtype))
    return total.float()


def tied_cross(x: Tensor, g_at_ids: Tensor, g_embedding: Tensor) -> Tensor:
    """< G_head, G_embedding > of every sample for one matrix that is both.

    x [B, S, N] are the inputs of the head, g_at_ids [B, S, T] the gradients of its outputs, of these only the columns of the ids
    looked up, g_embedding [B, T, N] the gradients of the rows looked up.
    """
    total = _zeros(x)
    step = max(1, BLOCK // max(1, g_at_ids.shape[0] * g_at_ids.shape[2]))
    for start in range(0, x.shape[1], step):
        rows = slice(start, start + step)
        product = _wide(x[:, rows]) @ _wide(g_embedding).mT
        total += product.mul_(g_at_ids[:, rows]).sum(dim=(1, 2))
    return total.float()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def _samples(each: int) -> int:
    return max(1, BLOCK // max(1, each))


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice, float]]:
    """(samples, rows, columns, multiplicity) that cover the lower triangle of the T x T products."""
    T = x.shape[1]
    step = _samples(min(T, TOKENS) ** 2)
    for first in range(0, x.shape[0], step):
        for row in range(0, T, TOKENS):
            for column in range(0, row + 1, TOKENS):
                rows, columns = slice(row, row + TOKENS), slice(column, column + TOKENS)
                yield slice(first, first + step), rows, columns, 1.0 if row == column else 2.0


def _bands(x: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor, slice]]:
    """(samples, their inputs, columns of g): at most `BLOCK` elements of g^T x at a time, and of the copy of x."""
    B, T, N = x.shape
    step = _samples(max(T, 64) * N)
    for first in range(0, B, step):
        these = slice(first, first + step)
        wide = _wide(x[these])
        width = max(1, BLOCK // max(1, wide.shape[0] * N))
        for column in range(0, g.shape[2], width):
            yield these, wide, slice(column, column + width)
