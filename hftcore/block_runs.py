"""Run one block of a model at a time on all batches, inside the model's own forward pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.calibration import Batch, prepared
from hftcore.capture import Meter
from hftcore.errors import HftcoreError
from hftcore.layers import Layer

_REPEATED = "the blocks must run one after the other, once for each batch, and in this model they do not; use {remedy}"
_DEPENDENT = (
    "the arguments of a block depend on what blocks further up than the one before it computed, so it cannot be run alone; "
    "use {remedy}"
)


def by_block(members: Sequence[nn.Module], layers: Sequence[Layer]) -> tuple[list[list[Layer]], list[Layer]]:
    """The layers that lie in each block, and those that lie in none."""
    insides = [set(block.modules()) for block in members]
    homes = [[layer for layer in layers if layer.module in inside] for inside in insides]
    placed = {layer.tensor for home in homes for layer in home}
    return homes, [layer for layer in layers if layer.tensor not in placed]


class _StopPass(Exception):  # noqa: N818 (nothing went wrong)
    """The block whose turn it is has run, and the rest of the forward pass is not wanted."""


class BlockRuns:
    """Runs one block at a time on all batches, each time inside the model's own forward pass.

    In such a pass the blocks before the last one compute nothing, the last one returns what it returned when it was its turn, the block
    whose turn it is runs, and there the pass ends. So what a block is given, hidden states, masks and rotary tables, is what the
    model makes for it. What the idle blocks return is NaN: an argument that depends on it shows, and is refused.

    Args:
        runner: the model or its body.
        members: its blocks, in their order.
        batches: as in `calibrate`; all of them are held on the model's device.
        hidden: holds the hidden states that a block returned, under the number of each batch; empty at first.
        remedy: what errors tell the user to use instead.

    Raises:
        HftcoreError: no batch.
    """

    def __init__(
        self,
        runner: nn.Module,
        members: Sequence[nn.Module],
        batches: Iterable[Batch],
        hidden: dict[int, Tensor],
        remedy: str,
    ):
        self.runner, self.members, self.hidden, self.remedy = runner, members, hidden, remedy
        self.batches = [
            ({key: value for key, value in inputs.items() if isinstance(value, Tensor)}, arguments)
            for inputs, arguments in prepared(runner, batches)
        ]
        if not self.batches:
            raise HftcoreError("batches must hold at least one batch, got none")
        # beside the hidden states: what the last block returned for each batch, and what each block returned for some batch
        self.rests: list[Any] = [None] * len(self.batches)
        self.idle: list[Any] = [None] * len(members)
        self.number = self.next = self.turn = 0
        self.keeps = True

    @torch.no_grad()
    def check_order(self) -> None:
        """Refuse a model whose blocks do not run once each in their order, by a pass of the first batch through all of it."""
        order: list[int] = []
        with ExitStack() as stack:
            for index, block in enumerate(self.members):
                note = block.register_forward_pre_hook(lambda *_, index=index: order.append(index))
                stack.callback(note.remove)
            self.runner(**_mapped(torch.clone, self.batches[0][1]))
        if order != [*range(len(self.members))]:
            raise self._error(_REPEATED)

    @torch.no_grad()
    def run(self, turn: int, meter: Meter | None = None, keeps: bool = True) -> None:
        """Run block `turn` on all batches; the blocks before it must have had their turns.

        Args:
            turn: the block's number; len(members) runs what comes after the blocks.
            meter: what watches the pass, a pass of its own for each batch.
            keeps: what the block returns takes the place of what the block before it returned. Otherwise its turn is not over.
        """
        self.turn, self.keeps = turn, keeps
        with ExitStack() as stack:
            for index, block in enumerate(self.members):
                stack.enter_context(_replaced(block, partial(self._forward, index, block.forward)))
            if meter is not None:
                stack.enter_context(meter.hooked(self.runner))
            for number, (inputs, arguments) in enumerate(self.batches):
                self.number, self.next = number, 0
                if meter is not None:
                    meter.begin(inputs)
                try:
                    # blocks may write into what they are given
                    self.runner(**_mapped(torch.clone, arguments))
                except _StopPass:
                    pass
                else:
                    if turn < len(self.members) or self.next < turn:
                        raise self._error(_REPEATED)
                if meter is not None:
                    meter.end()

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index != self.next:
            raise self._error(_REPEATED)
        self.next += 1
        if index < self.turn - 1:
            x = args[0] if args else kwargs["hidden_states"]
            return _joined(torch.full_like(x, torch.nan) if index == 0 else x, self.idle[index])
        if index < self.turn:
            x = self.hidden[self.number]
            return _joined(x if self.keeps else x.clone(), self.rests[self.number])
        if self.number == 0 and self.turn > 1 and _has_nan((args, kwargs)) and not _has_nan(self.hidden[0]):
            raise self._error(_DEPENDENT)
        output = forward(*args, **kwargs)
        if self.keeps:
            x, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
            self.hidden[self.number] = x
            self.rests[self.number] = rest
            if self.number == 0:
                self.idle[index] = _mapped(_unknown, rest)
        raise _StopPass

    def _error(self, text: str) -> HftcoreError:
        return HftcoreError(text.format(remedy=self.remedy))


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` be the block's, which may have one of its own."""
    own = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


def _joined(x: Tensor, rest: Any) -> Any:
    return x if rest is None else (x, *rest)


def _unknown(value: Tensor) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nest of arguments with `function` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(function, item) for item in value)
    return value


def _has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_nan, value))
