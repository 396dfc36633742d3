"""Calibrate a model that need not fit into memory: its blocks are read from their files one after the other."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor, nn

from hftcore.bindings.checkpoints.activations import Activations
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.bindings.checkpoints.weights import Part, build_model, by_name_in_memory, filled, find_parts
from hftcore.bindings.memory import available_memory
from hftcore.bindings.models_io import find_device
from hftcore.bindings.progress import Track
from hftcore.block_runs import BlockRuns, by_block
from hftcore.calibration import Batch, check_counts, runs_without_head
from hftcore.capture import Meter
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, blocks, find_layers

REMEDY = "the model in memory (--no-offload)"

# after(index, energy, data): block `index` is measured, its layers' energies, and the bytes it was read into;
# index len(members) and None for what no block holds
After = Callable[[int, Energy, Tensor | None], None]


def calibrate_folder(
    model: str | Path,
    batches: Iterable[Batch],
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    tokens: str = "all",
    *,
    device: str | None = None,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    budget: int | None = None,
) -> Energy:
    """What `hftcore.calibrate` returns for the model of a checkpoint folder, bit for bit, in the memory of two of its blocks.

    Each block is read once, all batches go through it, and what it returns replaces what it was given, while the next block is
    read. Embeddings and the like are mapped from their files. Beside two blocks and the energies, memory is needed for one batch inside a
    block and for the hidden states of all batches.

    Args:
        model: a folder with `config.json` and `.safetensors` files, sharded or not; experts fused or one by one.
        batches, targets, exclude, tokens: as for `hftcore.calibrate`. All batches are held in memory.
        device: where blocks run; None takes the first GPU if there is one.
        dtype: "auto" for that of the files, "float32", "bfloat16" or "float16".
        scratch: the folder for hidden states beyond `budget`; None for that of temporary files.
        budget: bytes of memory for hidden states; None for half of what is available.

    Raises:
        HftcoreError: as `hftcore.calibrate`; a damaged or quantised checkpoint, or one whose tensors are named or split in another way
            than in memory; a model whose blocks do not run one after the other, or share layers; no room in `scratch`.
        NonFiniteError: a layer's input is not finite.

    Source: FlexGen (Sheng et al. 2023, arXiv:2303.06865) walks a model in this order, block by block over all batches.
    """
    return Offloaded(model, targets, exclude, tokens, device, dtype).measure(batches, scratch, budget)


class Offloaded:
    """The model of a checkpoint folder, to be measured as `calibrate_folder` tells.

    Fields:
        members: its blocks.
        runner: what runs of it.
        homes, outside: the layers to measure that lie in each block, and those in none.
        parts: what each block that is needed holds, and where in memory it is read.
    """

    def __init__(
        self, model: str | Path, targets: Targets, exclude: Targets | None, tokens: str, device: str | None, dtype: str
    ) -> None:
        folder, self._place = Path(model), find_device(device)
        stored = list_tensors(folder)
        self._skeleton = build_model(folder, stored, dtype, self._place)
        stored = by_name_in_memory(self._skeleton, stored)
        self._layers, self._tokens = find_layers(self._skeleton, targets, exclude), tokens
        self.members = blocks(self._skeleton)
        self.homes, self.outside = by_block(self.members, self._layers)
        _refuse_shared(self.members, self._layers)
        # where all layers are behind the blocks, every block is needed
        last = len(self.members) - 1 if self.outside else max(index for index, home in enumerate(self.homes) if home)
        self.runner = runs_without_head(self._skeleton, self._layers)
        inside = {module for block in self.members for module in block.modules()}
        around = [module for module in self.runner.modules() if module not in inside]
        self._around = find_parts(self._skeleton, around, stored)
        self.parts = [find_parts(self._skeleton, [*block.modules()], stored) for block in self.members[: last + 1]]

    def measure(
        self,
        batches: Iterable[Batch],
        scratch: str | Path | None = None,
        budget: int | None = None,
        after: After | None = None,
    ) -> Energy:
        """What `calibrate_folder` returns; `after` may change the data it is given, which is used again once it returns."""
        meters = [Meter(home, self._tokens) for home in self.homes]
        rest = Meter(self.outside, self._tokens)
        buffers = [torch.empty(max(map(_size, self.parts)), dtype=torch.uint8) for _ in self.parts[:2]]
        if budget is None:
            budget = available_memory(torch.device("cpu")) // 2
        with ExitStack() as stack:
            stack.enter_context(filled(self._around, [part.mapped(self._place) for part in self._around]))
            if fused := [layer for layer in self._layers if layer.is_fused]:
                # in memory the experts of every block run one by one as soon as some are measured
                stack.enter_context(Meter(fused, self._tokens).hooked(self._skeleton))
            where = Path(tempfile.gettempdir() if scratch is None else scratch)
            hidden = stack.enter_context(closing(Activations(budget, where, self._place)))
            runs = BlockRuns(self.runner, self.members, batches, hidden, REMEDY)
            reader = stack.enter_context(ThreadPoolExecutor(1))
            last = len(self.parts) - 1
            ahead = reader.submit(_read, self.parts[0], buffers[0], self._place)
            for index in Track(range(last + 1), "calibrate"):
                tensors = ahead.result()
                if index < last:
                    ahead = reader.submit(_read, self.parts[index + 1], buffers[(index + 1) % 2], self._place)
                with filled(self.parts[index], tensors):
                    runs.run(index, meters[index] if self.homes[index] else None)
                if after is not None:
                    after(index, meters[index].energy, buffers[index % 2])
            runs.run(len(self.members), rest if self.outside else None)
        energy = _together(self._layers, [*meters, rest], self._tokens)
        if after is not None:
            after(len(self.members), rest.energy, None)
        return energy


def _read(parts: Sequence[Part], buffer: Tensor, device: torch.device) -> list[Tensor]:
    return [part.read(buffer).to(device) for part in parts]


def _size(parts: Sequence[Part]) -> int:
    return max((part.stop for part in parts), default=0)


def _together(layers: Sequence[Layer], meters: Sequence[Meter], tokens: str) -> Energy:
    """The energies of all layers, in their order."""
    values: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for meter in meters:
        meter.finish()
        values |= meter.energy
        counts |= meter.energy.expert_tokens
    whole = next(meter.energy for meter in meters if meter.energy)
    ordered = {layer.name: counts[layer.name] for layer in layers if layer.is_fused}
    energy = Energy({layer.name: values[layer.name] for layer in layers}, whole.tokens, whole.samples, ordered)
    check_counts(energy, tokens)
    return energy


def _refuse_shared(members: Sequence[nn.Module], layers: Sequence[Layer]) -> None:
    """Refuse a layer that several blocks use: its sum would be made in another order than in memory."""
    insides = [set(block.modules()) for block in members]
    for layer in layers:
        users = {layer.module, *layer.twins}
        where = [users & inside for inside in insides if users & inside]
        if len(where) > 1 or (where and where[0] != users):
            raise HftcoreError(
                f"layer {layer.name!r} is used by several blocks of the model; exclude it, or use {REMEDY}"
            )
