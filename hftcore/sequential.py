"""Energies block by block, each block fed by the blocks before it as they are by then: Wanda's own procedure."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.calibration import Batch, Progress, check_counts, evaluating, prepared, runs_without_head
from hftcore.capture import Meter
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, blocks

_REPEATED = (
    "the blocks must run one after the other, once for each batch, and in this model they do not; use sequential=False"
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def blockwise_energy(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[Layer],
    tokens: str = "all",
    progress: Progress | None = None,
) -> Iterator[tuple[list[Layer], Energy]]:
    """Yield (layers of a block, their energies) block by block; what is done to a block before the next step is seen
    by the next one.

    A pass over the model in which the blocks hand on what they are given notes how each block is called. After that every block
    runs twice on noted arguments, once to measure and once, as the consumer left it, to make the next block's inputs. The inputs of
    one block for all batches are held in memory. The first batch also runs through the whole model, to see what blocks return.

    Args:
        model, batches, tokens: as in `calibrate`.
        layers: what to measure (`find_layers`); all must lie inside the blocks. Blocks without a layer are only
            passed through.

    Raises:
        HftcoreError: a layer outside the blocks; no token to count; blocks whose other arguments depend on what the blocks before
            them computed; and what `capture_energy` raises.

    Source: Sun et al. 2023 (arXiv:2306.11695), `prune_wanda` of their code. Different: calls are noted for each block
    and not for the first one only, since blocks of one model may take different masks and rotary tables; padding is
    told apart.
    """
    members = blocks(model)
    insides = [set(block.modules()) for block in members]
    homes = [[layer for layer in layers if layer.module in inside] for inside in insides]
    placed = {layer.tensor for home in homes for layer in home}
    if outside := [layer.name for layer in layers if layer.tensor not in placed]:
        raise HftcoreError(
            f"layers outside the blocks cannot be calibrated block by block, exclude them: {', '.join(outside[:5])}"
        )
    last = max(index for index, home in enumerate(homes) if home)
    with evaluating(model):
        inputs, calls, hidden = _note_calls(runs_without_head(model, layers), members, batches, progress)
        for index, (block, home) in enumerate(zip(members, homes, strict=True)):
            if index > last:
                return
            if home:
                energy = _measure(model, block, Meter(home, tokens), inputs, calls[index], hidden)
                check_counts(energy, tokens)
                yield home, energy
            for number, x in enumerate(hidden) if index < last else ():
                hidden[number] = _run(block, calls[index][number], x)


@torch.no_grad()
def _measure(
    model: nn.Module, block: nn.Module, meter: Meter, inputs: list[Batch], calls: list[Call], hidden: list[Tensor]
) -> Energy:
    with meter.hooked(model):
        for batch, call, x in zip(inputs, calls, hidden, strict=True):
            meter.begin(batch)
            # a block may write into its input, which is needed once more
            _run(block, call, x.clone())
            meter.end()
    meter.finish()
    return meter.energy


@torch.no_grad()
def _run(block: nn.Module, call: Call, x: Tensor) -> Tensor:
    args, kwargs = call
    output = block(x, *args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _note_calls(
    runner: nn.Module, members: list[nn.Module], batches: Iterable[Batch], progress: Progress | None
) -> tuple[list[Batch], list[list[Call]], list[Tensor]]:
    """Batches, the arguments beside the hidden states for each block and batch, and the first block's hidden states."""
    inputs: list[Batch] = []
    calls: list[list[Call]] = [[] for _ in members]
    hidden: list[Tensor] = []

    def note(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        calls[index].append((rest, {key: value for key, value in kwargs.items() if key != "hidden_states"}))
        if index == 0:
            hidden.append(first.clone())

    with ExitStack() as stack:
        for index, block in enumerate(members):
            stack.callback(block.register_forward_pre_hook(partial(note, index), with_kwargs=True).remove)
        for batch, arguments in prepared(runner, batches, progress):
            if not inputs:
                # blocks may write into what they are given
                outputs = _outputs(runner, members, _mapped(torch.clone, arguments))
                seen, calls[:] = [*calls], [[] for _ in members]
                hidden.clear()
                for block, output in zip(members, outputs, strict=True):
                    stack.enter_context(_handing_on(block, output))
            inputs.append({key: value for key, value in batch.items() if isinstance(value, Tensor)})
            runner(**arguments)
            if len(inputs) == 1 and not _same(seen, calls):
                raise HftcoreError(
                    "the arguments of a block depend on what the blocks before it computed, so it cannot be run alone; "
                    "use sequential=False"
                )
    if not inputs:
        raise HftcoreError("batches must hold at least one batch, got none")
    if any(len(notes) != len(inputs) for notes in calls):
        raise HftcoreError(_REPEATED)
    return inputs, calls, hidden


def _outputs(runner: nn.Module, members: list[nn.Module], arguments: dict[str, Any]) -> list[Any]:
    """What each block returns in a real pass beside its hidden states: None, or a tuple."""
    order: list[int] = []
    outputs: list[Any] = []

    def note(index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        order.append(index)
        outputs.append(None if isinstance(output, Tensor) else output[1:])

    with ExitStack() as stack:
        for index, block in enumerate(members):
            stack.callback(block.register_forward_hook(partial(note, index)).remove)
        runner(**arguments)
    if order != [*range(len(members))]:
        raise HftcoreError(_REPEATED)
    return outputs


@contextmanager
def _handing_on(block: nn.Module, rest: Any) -> Iterator[None]:
    """The block computes nothing: it returns the hidden states it is given, and zeros in place of the tensors of `rest`."""
    rest = _mapped(torch.zeros_like, rest)

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return x if rest is None else (x, *rest)

    own = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nest of arguments with `function` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(function, item) for item in value)
    return value


def _same(left: Any, right: Any) -> bool:
    """Whether two nests of arguments hold the same tensors; what is neither a tensor nor a nest is not looked at."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return True
