"""Every Triton kernel at every launch configuration, compiled without a device; run as a module it prints one JSON line a kernel.

The launchers themselves say what they would launch: they are called on empty tensors while `JITFunction.run` only takes notes. So the
numbers of `kernels/launch.py` are not repeated here, and a new one is seen once it is used.

To be run in a process of its own, without Triton's interpreter, which cannot be left once it is on.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hftcore.bench.assembly import inspect
from hftcore.kernels import (
    launch,
    triton_blocks,
    triton_energy,
    triton_gradients,
    triton_likelihood,
    triton_matrix,
    triton_rows,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
FEW = (256, 4096, 11008, 28672)
# configurations that differ from others in little: left out where few are asked for
VARIANTS = ("prune_groups 2:4 mask", "cut mask", "prune_rows transposed", "column_energy 11008", "block_scores 4x4")
FLAGS = ("prune_rows mask", "prune_rows reference")  # of these few are of one dtype
ROWS = 2048  # enough for the widest tile; the launch numbers depend on more only below it


@dataclass(frozen=True)
class Launch:
    """What one call of a kernel would be compiled for.

    Fields:
        name: op and what tells its configurations apart, the width or a flag.
        dtype: of the weights or activations.
        arguments: name -> value, constants included.
    """

    name: str
    dtype: torch.dtype
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """The specialisation Triton makes for these arguments: ones are constants, multiples of 16 are known to be."""
        signature, fixed, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            is_special = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or (is_special and value == 1):
                signature[name], fixed[name] = "constexpr", value
                continue
            signature[name] = _type(value)
            if isinstance(value, Tensor) or (is_special and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, fixed, attributes)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def _noted() -> Iterator[list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]]:
    """Launches inside the block are noted instead of made."""
    notes: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []
    run = JITFunction.run

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {key: named.pop(key) for key in OPTIONS if key in named}
        notes.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | named, options))

    JITFunction.run = note
    try:
        yield notes
    finally:
        JITFunction.run = run


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype)  # never written, so the system gives it no memory


def _on_gpu(launcher: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Call a launcher that takes another way on the CPU; what these do with fake CUDA tensors works without CUDA."""
    with FakeTensorMode():
        launcher(*(torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes))


def _calls(dtype: torch.dtype, widths: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of a launcher, for each configuration it has."""
    for N in widths:
        weight, norm = _empty(ROWS, N, dtype=dtype), _empty(N)
        yield f"prune_rows {N}", partial(triton_rows.prune_rows, weight, norm, None, N // 2, False, None)
    weight, norm = _empty(ROWS, 4096, dtype=dtype), _empty(4096)
    mask = _empty(ROWS, 512, dtype=torch.uint8)
    turned, across = _empty(4096, ROWS, dtype=dtype).t(), _empty(4096)
    yield "prune_rows mask", lambda: triton_rows.prune_rows(weight, norm, None, 2048, False, mask)
    yield "prune_rows reference", lambda: triton_rows.prune_rows(weight, norm, weight, 2048, False, None)
    yield "prune_rows transposed", lambda: triton_rows.prune_rows(turned, across, None, 2048, False, None)
    yield "prune_groups 2:4", lambda: triton_rows.prune_groups(weight, norm, None, 2, 4, False, None)
    yield "prune_groups 2:4 mask", lambda: triton_rows.prune_groups(weight, norm, None, 2, 4, False, mask)
    yield "score_histogram", lambda: triton_matrix.score_histogram(weight, norm, None, 0, 13, 1 << 16)
    yield "tie_counts", lambda: triton_matrix.tie_counts(weight, norm, None, 77)
    quota = _empty(ROWS, dtype=torch.int64)
    yield "cut", lambda: triton_matrix.cut(weight, norm, None, 77, quota, False, None)
    yield "cut mask", lambda: triton_matrix.cut(weight, norm, None, 77, quota, False, mask)
    for side in (4, 16):
        yield f"block_scores {side}x{side}", partial(triton_blocks.block_scores, weight, norm, None, side, side)
    keep = _empty(8192, dtype=torch.bool)
    for N in (4096, 11008):
        x = _empty(8192, N, dtype=dtype)
        yield f"column_energy {N}", partial(triton_energy.column_energy, x, keep)
    shapes = (2, 512, 4096), (2, 512, 4096)
    yield "grad_norms_sq ghost", partial(_on_gpu, triton_gradients.ghost, *shapes, dtype=dtype)
    yield "grad_norms_sq direct", partial(_on_gpu, triton_gradients.direct, *shapes, dtype=dtype)
    yield "sequence_logprobs", partial(_on_gpu, _logprobs, (512, 4096), (32768, 4096), dtype=dtype)
    yield "weighted_cross_entropy", partial(_on_gpu, _logit_gradients, (512, 4096), (32768, 4096), dtype=dtype)


def _logprobs(rows: Tensor, head: Tensor) -> None:
    target = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    triton_likelihood.token_logprobs(rows, head, target, None, None)


def _logit_gradients(rows: Tensor, head: Tensor) -> None:
    target = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    lse, out = rows.new_empty(len(rows), dtype=torch.float32), rows.new_empty(len(rows), len(head))
    triton_likelihood.logit_gradients(rows, head, target, None, None, lse, lse, out)


def _half(widths: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    # float16 differs from bfloat16 in one conversion: the widest rows in registers stand for it
    N = max(width for width in widths if width <= launch.WIDEST_IN_REGISTERS)
    weight, norm = _empty(ROWS, N, dtype=torch.float16), _empty(N)
    yield f"prune_rows {N}", lambda: triton_rows.prune_rows(weight, norm, None, N // 2, False, None)


def all_widths() -> tuple[int, ...]:
    """Row lengths that between them ask for every tile there is for rows: the powers of two a row is padded to, and longer."""
    return (*(1 << power for power in range(5, launch.WIDEST_IN_REGISTERS.bit_length())), 11008, 28672)


def launches(few: bool = False, only: Collection[str] = ()) -> list[Launch]:
    """Every kernel and configuration, once each; or as few as tell whether all compile, or only those named."""
    widths = FEW if few else all_widths()
    found: list[Launch] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with _noted() as notes:
            for name, call in _half(widths) if dtype is torch.float16 else _calls(dtype, widths):
                if few and (name in VARIANTS or (name in FLAGS and dtype is torch.float32)):
                    continue
                if only and name not in only:
                    continue
                notes.clear()
                call()
                for kernel, arguments, options in notes:
                    if kernel.__name__ == "_score_histogram_kernel" and not name.startswith("score_histogram"):
                        continue  # a look at finiteness, whose kernel stands by itself
                    # helpers of an op that its main kernel's name does not tell
                    suffix = {"_combine_kernel": " combine", "_pack_kernel": " pack"}.get(kernel.__name__, "")
                    found.append(Launch(name + suffix, dtype, kernel, arguments, options))
    return found


def main(few: bool, only: Collection[str], targets: Sequence[str]) -> None:
    seen = set()
    for target in targets:
        for one in launches(few, only):
            source = one.source()
            # the helpers of two dtypes are one kernel
            identity = (target, one.name.split()[-1], source.hash(), one.options["num_warps"])
            if one.name.endswith((" combine", " pack")) and identity in seen:
                continue
            seen.add(identity)
            compiled = triton.compile(source, target=TARGETS[target], options=one.options)
            facts = {"kernel": one.name, "dtype": str(one.dtype).removeprefix("torch."), "target": target}
            facts |= {"warps": one.options["num_warps"], "triton": triton.__version__}
            print(json.dumps(facts | inspect(compiled, target)), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
