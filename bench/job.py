"""What a case is, what a prepared job is, and the shapes they are measured at."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16)
# [out, in] of weights, named after the models that have them
LAYERS = {
    "tiny": (64, 96),
    "smollm2.q_proj": (576, 576),
    "smollm2.down_proj": (576, 1536),
    "llama-7b.q_proj": (4096, 4096),
    "llama-7b.up_proj": (11008, 4096),
    "llama-7b.down_proj": (4096, 11008),
    "llama-3-8b.k_proj": (1024, 4096),
    "llama-3-8b.up_proj": (14336, 4096),
    "llama-3-70b.down_proj": (8192, 28672),
    "gemma-2-9b.up_proj": (14336, 3584),
    "qwen3-30b-a3b.expert": (1536, 2048),
    "lora-a r8": (8, 4096),
    "lora-b r8": (4096, 8),
    "lora-a r32": (32, 4096),
    "lora-b r32": (4096, 32),
    "lora-a": (256, 4096),
    "lora-b": (4096, 256),
}
SHAPES: dict[str, tuple[int, ...]] = LAYERS | {
    # [tokens, features]
    "tokens-attention": (2048, 4096),
    "tokens-mlp": (2048, 11008),
    "tokens-smollm2": (1024, 576),
    # [samples, tokens, in, out]
    "tiny-samples": (2, 8, 16, 12),
    "samples-7b T128": (4, 128, 4096, 4096),
    "samples-7b T512": (4, 512, 4096, 4096),
    "samples-7b T2048": (8, 2048, 4096, 4096),
    # [samples, tokens, hidden, vocabulary]
    "tiny-head": (2, 8, 16, 64),
    "smollm2.head": (4, 128, 576, 49152),
    "llama-3-8b.head": (2, 256, 4096, 128256),
    # [samples, tokens] of whole models
    "tiny-llama": (2, 16),
    "small-llama T128": (8, 128),
    "small-llama T512": (8, 512),
    "smollm2": (64, 128),
    "smollm2-short": (8, 128),
    "llama-1b": (8, 128),
    "llama-3-8b": (8, 512),
    "qwen3-moe": (8, 512),
    "dispatch": (4, 64),
}
QUICK = (
    "tiny",
    "dispatch",
    "tiny-llama",
    "tiny-samples",
    "tiny-head",
    "smollm2.q_proj",
    "lora-a",
    "lora-b",
    "llama-7b.q_proj",
    "tokens-attention",
    "samples-7b T128",
    "smollm2.head",
)


class UnavailableError(Exception):
    """A job that cannot be prepared here, with the reason and what to do."""


def shape_of(name: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The sizes of a named shape; "1gb" is one gibibyte in any dtype, and "4x64" says its sizes itself.

    >>> shape_of("1gb", torch.bfloat16), shape_of("4x64", torch.bfloat16)
    ((16384, 32768), (4, 64))
    """
    if name in SHAPES:
        return SHAPES[name]
    return (16384, 65536 // dtype.itemsize) if name == "1gb" else tuple(int(size) for size in name.split("x"))


@dataclass(frozen=True)
class Work:
    """What an ideal kernel does.

    Fields:
        bytes: read and written, each once.
        products: floating-point operations of matrix products.
        steps: other operations, one a lane, as counted in the kernel's source for independent normal weights.
    """

    bytes: int
    products: int = 0
    steps: int = 0


@dataclass
class Job:
    """One case at one shape and dtype, with its inputs in memory.

    Args:
        ours, peers, ceilings: calls without arguments. Ceilings return nothing of interest. A peer may be a `worker.Remote`.
        missing: peers that cannot run here, and why.
        restore: brings the inputs back after a call that changes them.
        agrees: whether a peer's answer (second) is ours (first), up to the ties it may break otherwise.
        answer: a copy, to compare, of what a call returned.
        check: raises ValueError unless our answer is right as far as can be told without a peer.
        compiled: peers that a compiler makes of plain code: another answer is the compiler's, and shown, not an error of the suite.
        inner: calls in a row for one time.
        rounds: so many in place of the run's, for jobs of many seconds or of microseconds.
        holds_memory: whether freed memory is kept by the process while it is timed, as a long training comes to by itself.
        is_long: of many seconds, so no call is made only to warm up.
        close: called when the job is done with.
    """

    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    restore: Callable[[], object]
    agrees: Callable[[Any, Any], bool]
    answer: Callable[[Any], Any] = torch.clone
    check: Callable[[Any], None] = lambda answer: None
    ceilings: dict[str, Callable[[], Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    compiled: Collection[str] = ()
    inner: int = 1
    rounds: int | None = None
    holds_memory: bool = False
    is_long: bool = False
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """An op or a whole call to measure.

    Args:
        about: one line for `hftcore-bench list`.
        shapes: names out of `SHAPES`, or "1gb"; the first is the one for tests and rehearsals.
        work: (sizes, bytes of an element) -> Work; None where that says nothing.
        prepare: (sizes, dtype, device) -> Job; raises UnavailableError.
        dtypes: of the weights or activations.
    """

    about: str
    shapes: tuple[str, ...]
    work: Callable[[tuple[int, ...], int], Work] | None
    prepare: Callable[[str, torch.dtype, torch.device], Job]
    dtypes: tuple[torch.dtype, ...] = FLOATS
