"""The meaning of every op, as plainly as PyTorch can say it.

Nothing here is fast or careful with memory. It is the judge: every backend must give these bits.
The contract of the arguments is in `kernels/README.md`.
"""

import torch
from torch import Tensor

FINITE = 0x7F800000  # keys from here on are infinities and NaNs
GOLDEN = 0x9E3779B97F4A7C15


def column_energy(x: Tensor, keep: Tensor | None) -> Tensor:
    """Σ over kept tokens of x², in float64 and rounded once to float32."""
    if keep is not None:
        x = x[keep]
    return x.double().square().sum(dim=0).float()


def keys(weight: Tensor, norm: Tensor, reference: Tensor | None) -> Tensor:
    """[M, N] int32: the bits of |w| * norm in float32."""
    w = weight.float() if reference is None else weight.float() - reference.float()
    # infinity times zero is a NaN with the sign bit set
    return (w.abs() * norm).contiguous().view(torch.int32) & 0x7FFFFFFF


def nonfinite(weight: Tensor, norm: Tensor, reference: Tensor | None) -> int:
    return int((keys(weight, norm, reference) >= FINITE).sum())


def lowest(key: Tensor, count: int) -> Tensor:
    """Of each row of `key`, the `count` first entries in the order (key, position), as booleans."""
    order = key.sort(dim=-1, stable=True).indices
    low = torch.zeros(key.shape, dtype=torch.bool, device=key.device)
    return low.scatter_(-1, order[..., :count], True)


def pack(mask: Tensor) -> Tensor:
    """Booleans [M, N] to bits [M, ceil(N / 8)], least significant bit first."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :columns] = mask
    weights = 2 ** torch.arange(8, device=mask.device)
    return (padded.view(rows, -1, 8) * weights).sum(-1).to(torch.uint8)


def unpack(mask: Tensor, columns: int) -> Tensor:
    """Bits [M, ceil(N / 8)] to booleans [M, N]."""
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(1)[:, :columns].bool()


def row_mask(weight: Tensor, norm: Tensor, reference: Tensor | None, count: int, invert: bool) -> Tensor:
    """[M, N] bool: removed weights when every row is a group."""
    return lowest(keys(weight, norm, reference), count) ^ invert


def matrix_mask(weight: Tensor, norm: Tensor, reference: Tensor | None, count: int, invert: bool) -> Tensor:
    """[M, N] bool: removed weights when the whole matrix is one group."""
    key = keys(weight, norm, reference)
    return lowest(key.flatten(), count).view(key.shape) ^ invert


def group_mask(weight: Tensor, norm: Tensor, reference: Tensor | None, n: int, m: int, invert: bool) -> Tensor:
    """[M, N] bool: removed weights, n of every m consecutive columns being the low set."""
    key = keys(weight, norm, reference)
    return (lowest(key.view(key.shape[0], -1, m), n) ^ invert).view(key.shape)


def score_histogram(weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, shift: int, bins: int) -> Tensor:
    key = keys(weight, norm, reference).flatten().long()
    window = (key - low) >> shift
    place = (window + 1).clamp(0, bins + 1)
    place[key >= FINITE] = bins + 2
    return torch.bincount(place, minlength=bins + 3)


def sampled_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, first: int, step: int) -> Tensor:
    return keys(weight, norm, reference).flatten()[first::step]


def keys_between(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, high: int, out: Tensor
) -> tuple[int, int, Tensor, Tensor]:
    key = keys(weight, norm, reference)
    inside = (key >= low) & (key < high)
    counts = inside.sum(dim=1)
    chosen = key[inside][: len(out)]
    out[: len(chosen)] = chosen
    return int((key < low).sum()), int((key >= FINITE).sum()), counts.cumsum(0) - counts, counts


def tie_counts(weight: Tensor, norm: Tensor, reference: Tensor | None, key: int) -> Tensor:
    return (keys(weight, norm, reference) == key).sum(dim=1)


def row_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, count: int) -> Tensor:
    return keys(weight, norm, reference).sort(dim=1).values[:, count - 1]


def row_counts(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: Tensor, high: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    key = keys(weight, norm, reference)
    inside = (key >= low[:, None]) & (key < high[:, None])
    counts = inside.sum(dim=1)
    chosen = key[inside][: len(out)]
    out[: len(chosen)] = chosen
    return (key < low[:, None]).sum(dim=1), counts.cumsum(0) - counts, counts


def row_merge(keys: Tensor, counts: Tensor, need: Tensor, place: int) -> tuple[Tensor, Tensor]:
    found, left = [], []
    runs = [own.split([*sizes.tolist(), len(own) - int(sizes.sum())]) for own, sizes in zip(keys, counts, strict=True)]
    for row, wanted in enumerate(need.tolist()):
        every = [own[row] for own in runs]
        key = torch.cat(every).sort().values[wanted - 1]
        below = sum(int((own < key).sum()) for own in every)
        ties = sum(int((own == key).sum()) for own in every[:place])
        found.append(int(key))
        left.append(max(0, wanted - below - ties))
    return torch.tensor(found, dtype=torch.int32), torch.tensor(left, dtype=torch.int64)


def cut_mask(
    weight: Tensor, norm: Tensor, reference: Tensor | None, key: int | Tensor, quota: Tensor, invert: bool
) -> Tensor:
    """[M, N] bool: removed weights for one threshold key, or [M, 1] of each row, and a quota of its ties in each row."""
    every = keys(weight, norm, reference)
    tie = every == key
    low = (every < key) | (tie & (tie.cumsum(dim=1) <= quota[:, None]))
    return low ^ invert


def block_scores(weight: Tensor, norm: Tensor, reference: Tensor | None, bm: int, bn: int) -> Tensor:
    score = keys(weight, norm, reference).view(torch.float32).double()
    total = torch.zeros(score.shape[0] // bm, score.shape[1] // bn, dtype=torch.float64, device=score.device)
    for row in range(bm):
        for column in range(bn):
            total += score[row::bm, column::bn].square()
    return total.float()


def masked_take(weight: Tensor, mask: Tensor) -> Tensor:
    return weight[unpack(mask, weight.shape[1])]


def masked_put(weight: Tensor, mask: Tensor, values: Tensor | None) -> None:
    weight[unpack(mask, weight.shape[1])] = 0 if values is None else values


def fingerprint(bits: Tensor, first: int = 0) -> int:
    total = 0
    modulus = 2**64
    width = 8 * bits.element_size()
    for i, signed in enumerate(bits.flatten().tolist(), first):
        z = (signed % 2**width + (i + 1) * GOLDEN) % modulus
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % modulus
        total = (total + (z ^ (z >> 31))) % modulus
    return total
