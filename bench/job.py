"""What a case is, what a prepared job is, and the shapes they are measured at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16)
SHAPES = {
    "tiny": (64, 96),
    "lora-a": (256, 4096),
    "lora-b": (4096, 256),
    "llama-7b.q_proj": (4096, 4096),
    "llama-7b.up_proj": (11008, 4096),
    "tokens-attention": (2048, 4096),
    "tokens-mlp": (2048, 11008),
    "dispatch": (4, 64),
    "tiny-llama": (2, 16),
    "smollm2": (64, 128),
    "smollm2-short": (8, 128),
}
QUICK = ("tiny", "dispatch", "tiny-llama", "lora-a", "lora-b", "llama-7b.q_proj", "tokens-attention")


class UnavailableError(Exception):
    """A job that cannot be prepared here, with the reason and what to do."""


def shape_of(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a named shape; "1gb" is one gibibyte in any dtype.

    >>> shape_of("1gb", torch.bfloat16)
    (16384, 32768)
    """
    return (16384, 65536 // dtype.itemsize) if name == "1gb" else SHAPES[name]


@dataclass
class Job:
    """One case at one shape and dtype, with its inputs in memory.

    Args:
        ours, peers, ceilings: calls without arguments. Ceilings return nothing of interest.
        restore: brings the inputs back after a call that changes them.
        agrees: whether a peer's answer (second) is ours (first), up to the ties it may break otherwise.
        answer: a copy, to compare, of what a call returned.
        check: raises ValueError unless our answer is right as far as can be told without a peer.
        inner: calls in a row for one time.
        rounds: so many in place of the run's, for jobs of many seconds or of microseconds.
        is_long: of many seconds, so no call is made only to warm up.
    """

    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    restore: Callable[[], object]
    agrees: Callable[[Any, Any], bool]
    answer: Callable[[Any], Any] = torch.clone
    check: Callable[[Any], None] = lambda answer: None
    ceilings: dict[str, Callable[[], Any]] = field(default_factory=dict)
    inner: int = 1
    rounds: int | None = None
    is_long: bool = False


@dataclass(frozen=True)
class Case:
    """An op or a whole call to measure.

    Args:
        about: one line for `hftcore-bench list`.
        shapes: names out of `SHAPES`, or "1gb"; the first is the one for tests and rehearsals.
        bytes_moved: (rows, columns, itemsize) -> bytes an ideal kernel reads and writes; None where that says nothing.
        prepare: (shape name, dtype, device) -> Job; raises UnavailableError.
        dtypes: of the weights or activations.
    """

    about: str
    shapes: tuple[str, ...]
    bytes_moved: Callable[[int, int, int], int] | None
    prepare: Callable[[str, torch.dtype, torch.device], Job]
    dtypes: tuple[torch.dtype, ...] = FLOATS
