"""A call's Triton kernels alone, replayed from a CUDA graph: what they take without checks, dispatch and reading results back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def kernels_alone(call: Callable[[], Any]) -> Callable[[], None] | None:
    """Make the call once, noting its launches; replaying them then repeats the kernels with the same arguments.

    Returns:
        None where the call launches no Triton kernel, or torch cannot capture it.
    """
    from triton.runtime.jit import JITFunction

    notes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def noted(kernel: Any, *args: Any, **named: Any) -> Any:
        notes.append((kernel, args, named))
        return run(kernel, *args, **named)

    JITFunction.run = noted
    try:
        call()
    finally:
        JITFunction.run = run
    if not notes:
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for kernel, args, named in notes:
                kernel.run(*args, **named)
    except RuntimeError:
        return None
    # the graph holds addresses: the notes keep their tensors alive
    return partial(_replay, graph, notes)


def _replay(graph: torch.cuda.CUDAGraph, _kept: object) -> None:
    graph.replay()
