"""Native CPU implementations: C++ called through ctypes, which releases the interpreter lock.

The contract of the ops is in `kernels/README.md`. AVX-512 (with its products of bfloat16, if there), AVX2 or portable code is chosen at
run time, and PyTorch's thread count decides how many threads may run. `HFTCORE_SIMD` or `use_simd` force one of the paths, for tests
and comparisons.
"""

import ctypes
import importlib.machinery
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hftcore.kernels.eager import empty_mask

SIMDS = ("portable", "avx2", "avx512", "avx512bf16")  # the index is the number the library knows the path by
MANY_ROWS = 1 << 18  # with a cut kept for each, rows in place would take more than 4 MB
BAND = 192  # rows of a head at a time; the library asks for a multiple of 12
TILE = 132  # tokens of a tile of a Gram matrix at most; the same
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OPS = (
    "column_energy",
    "nonfinite",
    "prune_rows",
    "prune_groups",
    "score_histogram",
    "tie_counts",
    "cut",
    "block_scores",
    "masked_take",
    "masked_put",
    "fingerprint",
    "mask_counts",
    "sampled_keys",
    "keys_between",
    "row_keys",
    "row_merge",
    "lower_gram",
    "ghost_norms",
    "shares",
    "logprobs",
    "logit_gradients",
)


class _Job(ctypes.Structure):
    """One call, field by field as `Job` in `common.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "threads", "rows", "columns")),
        ("weight", ctypes.c_void_p),
        ("weight_row", ctypes.c_int64),
        ("weight_column", ctypes.c_int64),
        ("reference", ctypes.c_void_p),
        ("reference_row", ctypes.c_int64),
        ("reference_column", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norm", "mask", "rowwise", "values", "keys")),
        *((name, ctypes.c_int64) for name in ("invert", "a", "b", "c")),
    )


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    folder = Path(__file__).parent
    paths = [folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = [path for path in paths if path.exists()]
    if not built:
        return None, "the native library was not built; install a C++17 compiler and run `pip install` again"
    try:
        library = ctypes.CDLL(str(built[0]))
        library.hftcore_run.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Job))
        library.hftcore_use_team.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded ({error}); run `pip install` again"
    return library, ""


def _pytorchs_team() -> int | None:
    """The address of what starts PyTorch's threads; None where its OpenMP is not GNU's."""
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # looks in the libraries that this one needs, too
    except (OSError, AttributeError):
        return None
    return ctypes.cast(start, ctypes.c_void_p).value


_library, _reason = _load()
_team = _pytorchs_team()


def _use_team(team: int | None) -> None:
    if _library is not None:
        _library.hftcore_use_team(team)


_use_team(_team)
if hasattr(os, "register_at_fork"):  # not on Windows
    # a fork has none of the team's threads, and would wait for them for ever
    os.register_at_fork(after_in_child=lambda: _use_team(None))
_forced: str | None = None


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library is not None


def reason() -> str:
    """Why the library is not available; empty when it is."""
    return _reason


def simds() -> tuple[str, ...]:
    """The paths this machine can run, slowest first; empty where the library is not available."""
    return () if _library is None else SIMDS[: _library.hftcore_best_simd() + 1]


def simd() -> str:
    """The path calls take now: "avx512bf16", "avx512", "avx2" or "portable"."""
    usable = simds()
    wanted = _forced or os.environ.get("HFTCORE_SIMD")
    if wanted is None:
        return usable[-1] if usable else "portable"
    if wanted not in usable:
        raise ValueError(f"HFTCORE_SIMD must be one of {', '.join(usable)} on this machine, got {wanted!r}")
    return wanted


@contextmanager
def use_simd(name: str) -> Iterator[None]:
    """Makes calls take the path `name` inside the block, on every thread.

    Raises:
        ValueError: if this machine cannot run it.
    """
    global _forced
    if name not in simds():
        raise ValueError(f"name must be one of {', '.join(simds())} on this machine, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def shares_threads() -> bool:
    """Whether the threads are PyTorch's, which costs least, and not threads of this library's own."""
    return _library is not None and _team is not None


@contextmanager
def use_own_threads() -> Iterator[None]:
    """Makes calls start threads of this library's own inside the block."""
    _use_team(None)
    try:
        yield
    finally:
        _use_team(_team)


def _call(op: str, job: _Job) -> None:
    if _library is None:
        raise RuntimeError(f"hftcore.kernels.native.{op} needs the native library: {_reason}")
    job.threads = torch.get_num_threads()
    status = _library.hftcore_run(SIMDS.index(simd()), OPS.index(op), ctypes.byref(job))
    if status == 1:
        raise MemoryError(f"{op} could not allocate its work space; nothing was changed")
    if status:
        raise RuntimeError(f"{op} is unknown to the native library; run `pip install` again")


def _matrix(weight: Tensor) -> _Job:
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    return _Job(
        dtype=DTYPES[weight.dtype],
        rows=weight.shape[0],
        columns=weight.shape[1],
        weight=weight.data_ptr(),
        weight_row=weight.stride(0),
        weight_column=weight.stride(1),
    )


def _scores(weight: Tensor, norm: Tensor, reference: Tensor | None) -> _Job:
    job = _matrix(weight)
    job.norm = norm.data_ptr()
    if reference is not None:
        job.reference = reference.data_ptr()
        job.reference_row, job.reference_column = reference.stride()
    return job


def _changed(weight: Tensor) -> None:
    """Lets autograd notice a tensor that was saved for backward and then changed here."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def column_energy(x: Tensor, keep: Tensor | None) -> Tensor:
    tokens, columns = x.shape
    if x.numel() == 0:
        return x.new_zeros(columns, dtype=torch.float32)
    job = _matrix(x)
    # slabs of tokens depend on the shape alone, so that the sums do too
    job.a = max(1024, -(-tokens // 64))
    job.b = -(-columns // 1024)
    total = x.new_empty(-(-tokens // job.a), columns, dtype=torch.float64)
    job.values = total.data_ptr()
    if keep is not None:
        keep = keep.contiguous()
        job.mask = keep.data_ptr()
    _call("column_energy", job)
    energy = total[0]
    for slab in total[1:]:
        energy += slab
    return energy.float()


def nonfinite(weight: Tensor, norm: Tensor, reference: Tensor | None) -> int:
    job = _scores(weight, norm, reference)
    total = ctypes.c_int64(0)
    job.values = ctypes.addressof(total)
    if weight.numel():
        _call("nonfinite", job)
    return total.value


def prune_rows(
    weight: Tensor, norm: Tensor, reference: Tensor | None, count: int, invert: bool, mask: Tensor | None
) -> int:
    job = _scores(weight, norm, reference)
    job.a, job.invert = count, invert
    job.mask = None if mask is None else mask.data_ptr()
    refused = ctypes.c_int64(0)
    job.values = ctypes.addressof(refused)
    if weight.numel():
        job.b = mask is None and weight.shape[0] > MANY_ROWS and not nonfinite(weight, norm, reference)
        _call("prune_rows", job)
        if mask is None:
            _changed(weight)
    return refused.value


def prune_groups(
    weight: Tensor, norm: Tensor, reference: Tensor | None, n: int, m: int, invert: bool, mask: Tensor | None
) -> int:
    if mask is None and nonfinite(weight, norm, reference):
        mask = empty_mask(weight)  # to count them, and leave the weights alone
    job = _scores(weight, norm, reference)
    job.a, job.b, job.invert = n, m, invert
    job.mask = None if mask is None else mask.data_ptr()
    refused = ctypes.c_int64(0)
    job.values = ctypes.addressof(refused)
    if weight.numel():
        _call("prune_groups", job)
        if mask is None:
            _changed(weight)
    return refused.value


def score_histogram(weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, shift: int, bins: int) -> Tensor:
    counts = weight.new_zeros(bins + 3, dtype=torch.int64)
    job = _scores(weight, norm, reference)
    job.a, job.b, job.c = low, shift, bins
    job.values = counts.data_ptr()
    if weight.numel():
        _call("score_histogram", job)
    return counts


def sampled_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, first: int, step: int) -> Tensor:
    key = weight.new_empty(max(0, -(-(weight.numel() - first) // step)), dtype=torch.int32)
    job = _scores(weight, norm, reference)
    job.a, job.b, job.c = first, step, len(key)
    job.values = key.data_ptr()
    if len(key):
        _call("sampled_keys", job)
    return key


def keys_between(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: int, high: int, out: Tensor
) -> tuple[int, int, Tensor, Tensor]:
    rows = weight.shape[0]
    found = weight.new_zeros(2 * rows + 3, dtype=torch.int64)
    job = _scores(weight, norm, reference)
    job.a, job.b, job.c = low, high, len(out)
    job.rowwise, job.values = found.data_ptr(), out.data_ptr()
    if weight.numel():
        _call("keys_between", job)
    below, _, spoiled = found[2 * rows :].tolist()
    return below, spoiled, found[:rows], found[rows : 2 * rows]


def tie_counts(weight: Tensor, norm: Tensor, reference: Tensor | None, key: int) -> Tensor:
    counts = weight.new_zeros(weight.shape[0], dtype=torch.int64)
    job = _scores(weight, norm, reference)
    job.a = key
    job.rowwise = counts.data_ptr()
    if weight.numel():
        _call("tie_counts", job)
    return counts


def cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    key: int,
    quota: Tensor,
    invert: bool,
    mask: Tensor | None,
) -> None:
    job = _scores(weight, norm, reference)
    quota = quota.contiguous()
    job.a, job.invert = key, invert
    job.rowwise = quota.data_ptr()
    job.mask = None if mask is None else mask.data_ptr()
    if weight.numel():
        _call("cut", job)
        if mask is None:
            _changed(weight)


def row_keys(weight: Tensor, norm: Tensor, reference: Tensor | None, count: int) -> Tensor:
    key = weight.new_empty(weight.shape[0], dtype=torch.int32)
    job = _scores(weight, norm, reference)
    job.a, job.values = count, key.data_ptr()
    if weight.numel():
        _call("row_keys", job)
    return key


def row_counts(
    weight: Tensor, norm: Tensor, reference: Tensor | None, low: Tensor, high: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.shape[0]
    window = torch.cat([low, high])
    found = weight.new_zeros(3 * rows + 3, dtype=torch.int64)
    job = _scores(weight, norm, reference)
    job.keys, job.c = window.data_ptr(), len(out)
    job.rowwise, job.values = found.data_ptr(), out.data_ptr()
    if weight.numel():
        _call("keys_between", job)
    return found[2 * rows + 3 :], found[:rows], found[rows : 2 * rows]


def row_cut(
    weight: Tensor,
    norm: Tensor,
    reference: Tensor | None,
    key: Tensor,
    quota: Tensor,
    invert: bool,
    mask: Tensor,
) -> None:
    job = _scores(weight, norm, reference)
    key, quota = key.contiguous(), quota.contiguous()
    job.keys, job.rowwise, job.invert, job.mask = key.data_ptr(), quota.data_ptr(), invert, mask.data_ptr()
    if weight.numel():
        _call("cut", job)


def row_merge(keys: Tensor, counts: Tensor, need: Tensor, place: int) -> tuple[Tensor, Tensor]:
    processes, rows = counts.shape
    keys, starts = keys.contiguous(), counts.cumsum(1) - counts
    table = torch.cat([starts.flatten(), counts.flatten(), need, need.new_empty(2 * rows)])
    job = _Job(rows=rows, columns=processes, values=keys.data_ptr(), rowwise=table.data_ptr(), a=keys.shape[1], b=place)
    if rows:
        job.c = int(counts.sum(0).max())
        _call("row_merge", job)
    return table[-2 * rows : len(table) - rows].int(), table[len(table) - rows :]


def block_scores(weight: Tensor, norm: Tensor, reference: Tensor | None, bm: int, bn: int) -> Tensor:
    total = weight.new_empty(weight.shape[0] // bm, weight.shape[1] // bn, dtype=torch.float32)
    job = _scores(weight, norm, reference)
    job.a, job.b = bm, bn
    job.values = total.data_ptr()
    if total.numel():
        _call("block_scores", job)
    return total


def _offsets(job: _Job, mask: Tensor) -> tuple[Tensor, int]:
    """Where each row's entries begin among all marked ones, and how many there are."""
    ends = mask.new_zeros(mask.shape[0] + 1, dtype=torch.int64)
    job.mask, job.rowwise = mask.data_ptr(), ends[1:].data_ptr()
    _call("mask_counts", job)
    ends = ends.cumsum(0)
    return ends, int(ends[-1])


def masked_take(weight: Tensor, mask: Tensor) -> Tensor:
    if not weight.numel():
        return weight.new_empty(0)
    job = _matrix(weight)
    offsets, total = _offsets(job, mask)
    values = weight.new_empty(total)
    job.rowwise, job.values = offsets.data_ptr(), values.data_ptr()
    _call("masked_take", job)
    return values


def masked_put(weight: Tensor, mask: Tensor, values: Tensor | None) -> None:
    if not weight.numel():
        return
    job = _matrix(weight)
    if values is None:
        job.mask = mask.data_ptr()
        _call("masked_put", job)
    else:
        values = values.contiguous()
        offsets, total = _offsets(job, mask)
        if values.shape != (total,) or values.dtype != weight.dtype:
            raise ValueError(
                f"values must be {weight.dtype} of shape ({total},), one for each marked weight, "
                f"got {values.dtype} {tuple(values.shape)}"
            )
        if total == 0:
            return
        job.rowwise, job.values = offsets.data_ptr(), values.data_ptr()
        _call("masked_put", job)
    _changed(weight)


def fingerprint(bits: Tensor, first: int = 0) -> int:
    total = ctypes.c_uint64(0)
    if bits.numel():
        bits = bits.contiguous()
        job = _Job(dtype=bits.element_size(), weight=bits.data_ptr(), a=bits.numel(), b=1 << 16, c=first)
        job.values = ctypes.addressof(total)
        _call("fingerprint", job)
    return total.value


def multiplies(*factors: Tensor) -> bool:
    """Whether the products below take these, and take less time than PyTorch's here."""
    # AVX2 has too few registers to widen factors on their way
    served = {"portable": (), "avx2": (torch.float32,)}.get(simd(), DTYPES)
    return all(factor.dtype in served for factor in factors)


def lower_gram(x: Tensor) -> Tensor:
    """As that of `kernels/gradients.py`, but not of float64."""
    B, T, _ = x.shape
    gram = x.new_zeros(B, T, T, dtype=torch.float32)
    _call_grams("lower_gram", x, None, None, gram)
    return gram


def ghost(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    """As that of `kernels/gradients.py`, but not of float64; the same bits whatever the thread count."""
    B, T, _ = x.shape
    tiles = -(-T // TILE)
    squares = x.new_zeros(B, tiles * (tiles + 1) // 2, dtype=torch.float64)
    _call_grams("ghost_norms", x, g, None if gram is None else gram.float().contiguous(), squares)
    return squares.sum(dim=1).clamp_(min=0).float()


def direct(x: Tensor, g: Tensor) -> Tensor:
    """As that of `kernels/gradients.py`, but not of float64; the same bits whatever the thread count."""
    return _shares(x, g, None)


def direct_with_gradient(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """As that of `kernels/gradients.py`, but not of float64; the same bits whatever the thread count."""
    shape = g.shape[2], x.shape[2]
    gradient = (x.new_empty if x.numel() and g.numel() else x.new_zeros)(shape, dtype=torch.float32)
    return _shares(x, g, gradient), gradient


def _shares(x: Tensor, g: Tensor, gradient: Tensor | None) -> Tensor:
    squares = x.new_zeros(x.shape[0], dtype=torch.float64)
    if x.numel() and g.numel():
        x, g = _factors(x, g)
        job = _tokens(x, g)
        job.rowwise = squares.data_ptr()
        if gradient is not None:
            job.values = gradient.data_ptr()
        _call("shares", job)
    return squares.float()


def _call_grams(op: str, x: Tensor, g: Tensor | None, gram: Tensor | None, out: Tensor) -> None:
    if not x.numel() or (g is not None and not g.numel()):
        return
    x, g = _factors(x, x if g is None else g)
    job = _tokens(x, g)
    job.c, job.values = TILE, out.data_ptr()
    if gram is not None:
        job.norm = gram.data_ptr()
    _call(op, job)


def _factors(*tensors: Tensor) -> list[Tensor]:
    """The same with their last axis contiguous, and of one dtype."""
    is_mixed = len({tensor.dtype for tensor in tensors}) > 1
    wide = [tensor.float() if is_mixed else tensor for tensor in tensors]
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in wide]


def _tokens(x: Tensor, g: Tensor) -> _Job:
    job = _Job(dtype=DTYPES[x.dtype], rows=x.shape[1], columns=x.shape[2], a=x.shape[0], b=g.shape[2])
    job.weight, job.reference = x.data_ptr(), g.data_ptr()
    job.weight_column, job.weight_row, _ = x.stride()
    job.reference_column, job.reference_row, _ = g.stride()
    return job


def softmax_parts(rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each band of the head's rows the greatest logit of each token and the sum of exponentials relative to it, [bands, S] float32
    each, and the logits of the targets, [S]; the same bits whatever the thread count."""
    count, bands = len(rows), -(-len(head) // BAND)
    found = rows.new_empty(2 * bands + 1, count, dtype=torch.float32)
    _call_logits("logprobs", rows, head, target, bias, found)
    parts = found[:-1].view(bands, 2, count)
    return parts[:, 0], parts[:, 1], found[-1]


def logit_gradients(
    rows: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, lse: Tensor, coefficient: Tensor
) -> Tensor:
    """coefficient[s] * ([target[s] is v] - exp(logit[s, v] - lse[s])), [V, S] float32; targets outside 0..V-1 are nobody's."""
    found = rows.new_empty(len(head), len(rows), dtype=torch.float32)
    _call_logits("logit_gradients", rows, head, target, bias, found, torch.stack((lse.float(), coefficient.float())))
    return found


def _call_logits(
    op: str,
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    out: Tensor,
    of_tokens: Tensor | None = None,
) -> None:
    if not out.numel():
        return
    rows, head = _factors(rows, head)
    target = target.contiguous()
    job = _Job(dtype=DTYPES[rows.dtype], rows=len(rows), columns=rows.shape[1], a=BAND, b=len(head))
    job.weight, job.weight_row = rows.data_ptr(), rows.stride(0)
    job.reference, job.reference_row = head.data_ptr(), head.stride(0)
    job.rowwise, job.values = target.data_ptr(), out.data_ptr()
    if bias is not None:
        bias = bias.float().contiguous()
        job.norm = bias.data_ptr()
    if of_tokens is not None:
        job.mask = of_tokens.data_ptr()
    _call(op, job)
