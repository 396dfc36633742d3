r"""Per-sample squared gradient norms of matrices that multiply, or look up, tokens.

    direct   || g^T x ||_F^2              2 T M N operations a sample
    ghost    < x x^T, g g^T >             T^2 (M + N) with symmetry        (Li et al. 2022, arXiv:2110.05679, section 4)

for x [T, N] the inputs of one sample and g [T, M] the gradients of its outputs. Both forms are walked in blocks, so that neither a
T x T nor an M x N matrix of every sample exists; products and sums are float32 whatever the dtype (float64 stays float64).

Where the gradient itself is wanted too, each sample's g^T x is its share of it, so the direct form costs one square-sum and one
addition of a block that lies in the cache.

The meanings come first; the implementations in plain PyTorch, for any device, follow.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hftcore.kernels.products import accumulator, fast_products, widened

BLOCK = 1 << 20  # elements of a temporary
PANEL = 64  # tokens of a panel of the ghost form: smaller ones gain more from symmetry, and products of this size run at full speed
TILE = 1 << 18  # elements of g^T x made at a time: 1 MiB of float32, a level-2 cache
SQUARE = 20  # operations of a product in the time in which an element of a tile is squared and added
SHARE = 40  # the same for adding it to the gradient, which lies in no cache


def reference_grad_norms_sq(x: Tensor, g: Tensor) -> Tensor:
    """squares[b] = sum over m, n of (sum over t of g[b, t, m] x[b, t, n])^2"""
    return torch.einsum("btm,btn->bmn", g, x).square().sum(dim=(1, 2))


def reference_embedding_grad_norms_sq(ids: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    """As `reference_grad_norms_sq` with x the one-hot rows of `ids`; the row `padding_idx` has no gradient."""
    x = torch.nn.functional.one_hot(ids).to(g.dtype)
    if padding_idx is not None and padding_idx < x.shape[2]:
        x[:, :, padding_idx] = 0
    return reference_grad_norms_sq(x, g)


def ghost_cost(T: int, M: int, N: int) -> float:
    """The time of the ghost form here, in operations of a product."""
    return T * (T + min(T, PANEL)) * (M + N)


def is_ghost(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    """Whether the ghost form costs less than the direct one; with the Gram matrix of x at hand only g g^T is left."""
    return ghost_cost(T, M, 0 if has_gram else N) < (2 * T + SQUARE) * M * N


def is_direct_with_gradient(T: int, M: int, N: int, has_gram: bool = False) -> bool:
    """Whether `direct_with_gradient` costs less than the ghost form beside an ordinary product."""
    return ghost_cost(T, M, 0 if has_gram else N) > (SQUARE + SHARE) * M * N


def is_input_gradient(g: Tensor, weight: Tensor) -> bool:
    """Whether `input_gradient` costs less than the product that autograd forms; `g` may be any tensor of its shape and dtype."""
    return False


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """[..., N]: the gradient of x in x W^T, from that of the result, [..., M], and W [M, N]."""
    return g @ weight


def grad_norms_sq(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    if is_ghost(x.shape[1], g.shape[2], x.shape[2], gram is not None):
        return ghost(x, g, gram)
    return direct(x, g)


def ghost(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    """`gram` is `lower_gram(x)`, or anything that agrees with it below the diagonal."""
    total = _zeros(x)
    with fast_products(torch.promote_types(x.dtype, g.dtype), x.device):
        for these, rows, columns in _panels(x):
            a = _products(x, these, rows, columns) if gram is None else gram[these, rows, columns]
            c = _products(g, these, rows, columns).mul_(a)
            # what lies left of the diagonal block stands for its mirror image too
            total[these] += 2 * c[:, :, : rows.start].sum(dim=(1, 2)) + c[:, :, rows.start :].sum(dim=(1, 2))
    # rounding can leave a tiny negative number where terms cancel; a NaN stays one
    return total.clamp_(min=0).float()


def lower_gram(x: Tensor) -> Tensor:
    """x x^T of every sample, [B, T, T]: what `ghost` reads of it, the entries up to the diagonal; others may be zero."""
    gram = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=_zeros(x).dtype, device=x.device)
    with fast_products(x.dtype, x.device):
        for these, rows, columns in _panels(x):
            gram[these, rows, columns] = _products(x, these, rows, columns)
    return gram


def input_gram(x: Tensor) -> Tensor:
    """x x^T of every sample, [B, T, T]."""
    gram = lower_gram(x)
    return gram.tril() + gram.tril(-1).mT


def direct(x: Tensor, g: Tensor) -> Tensor:
    return _direct(x, g, None)


def direct_with_gradient(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norms and the sum over samples of g^T x, [M, N]: each product serves both."""
    gradient = torch.empty(g.shape[2], x.shape[2], dtype=accumulator(x.dtype), device=x.device)
    return _direct(x, g, gradient), gradient


def _direct(x: Tensor, g: Tensor, gradient: Tensor | None) -> Tensor:
    B, M, N = x.shape[0], g.shape[2], x.shape[2]
    with fast_products(torch.promote_types(x.dtype, g.dtype), x.device):
        if B * M * N <= TILE:
            products = widened(g).mT @ widened(x)
            if gradient is not None:
                torch.sum(products, dim=0, out=gradient)
            return products.square_().sum(dim=(1, 2)).float()
        # tiles of one height, for the last not to be a thin one
        height = -(-M // -(-M * N // TILE))
        buffer = torch.empty(height, N, dtype=accumulator(x.dtype), device=x.device)
        squares = []
        for start in range(0, M, height):
            stop = min(start + height, M)
            share, rows = buffer[: stop - start], None if gradient is None else gradient[start:stop]
            for sample, (inputs, outputs) in enumerate(zip(x, g, strict=True)):
                # the first sample's share starts the sum
                tile = rows if rows is not None and sample == 0 else share
                torch.mm(widened(outputs[:, start:stop]).t(), widened(inputs), out=tile)
                squares.append(torch.dot(tile.view(-1), tile.view(-1)))
                if rows is not None and sample:
                    rows += tile
    return torch.stack(squares).view(-1, B).sum(dim=0).float()


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
        vocabulary = 1 + tokens.amax() if tokens.numel() else 1
        pair = tokens + vocabulary * torch.arange(tokens.shape[0], device=ids.device).unsqueeze(1)
        pairs, group = pair.flatten().unique(return_inverse=True)
        sums = torch.zeros(pairs.shape[0], g.shape[2], dtype=torch.float64, device=g.device)
        sums.index_add_(0, group, wide.flatten(0, 1))
        total[these].index_add_(0, pairs // vocabulary, sums.square_().sum(dim=1).to(total.dtype))
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
        product = widened(x[:, rows]) @ widened(g_embedding).mT
        total += product.mul_(g_at_ids[:, rows]).sum(dim=(1, 2))
    return total.float()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=accumulator(x.dtype), device=x.device)


def _samples(each: int) -> int:
    return max(1, BLOCK // max(1, each))


def _panels(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(samples, rows, columns) that cover the T x T products up to the diagonal; a panel ends with its diagonal block."""
    T = x.shape[1]
    step = _samples(min(T, PANEL) * T)
    for first in range(0, x.shape[0], step):
        for row in range(0, T, PANEL):
            yield slice(first, first + step), slice(row, row + PANEL), slice(0, row + PANEL)


def _products(x: Tensor, these: slice, rows: slice, columns: slice) -> Tensor:
    return widened(x[these, rows]) @ widened(x[these, columns]).mT
