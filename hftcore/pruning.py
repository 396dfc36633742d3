"""Prune a model: score, select and remove, layer by layer, into a reversible Edit."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftcore import checks, ops
from hftcore.edit import Edit, apply_tensor_, matrices, record, revert_tensor_
from hftcore.energy import Energy
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.layers import Layer, Targets, find_layers
from hftcore.matching import check_energy, energy_layers, reference_weights, refuse_unmeasured
from hftcore.parts import Part
from hftcore.pattern import Pattern
from hftcore.selection import find_cut
from hftcore.sequential import blockwise_energy

Score = Literal["wanda", "magnitude", "random"]


def prune(
    model: nn.Module,
    energy: Energy | Iterable[Mapping[str, Tensor]] | None,
    pattern: Pattern | str,
    *,
    reference: nn.Module | None = None,
    score: Score = "wanda",
    seed: int = 0,
    minus: tuple[Energy, Pattern | str] | None = None,
    targets: Targets | None = None,
    exclude: Targets | None = None,
    sequential: bool = False,
    tokens: str = "all",
) -> Edit:
    """Remove the weights a pattern selects, in place, and return the Edit that can undo it.

    Args:
        model: any nn.Module; changed in place, and left as it was if anything fails.
        energy: what `calibrate` returned: its layers are the ones pruned. With `sequential`, the calibration batches instead. None
            for scores that use none: `targets` then names the layers.
        pattern: how much, compared with what, from which end: a `Pattern`, or its text such as "50%".
        reference: a model with the same parameter names: the score is that of the difference to its weights, and removed weights
            take its values instead of zero.
        score: "wanda" |w|·norm; "magnitude" |w| alone; "random" a seeded uniform score, the baselines of the papers.
        seed: of the random score.
        minus: (energy, pattern) of benign data; weights it selects too are spared (set difference).
        targets, exclude: restrict the layers, in PEFT's convention (see `calibrate`).
        sequential: calibrate each block after the blocks before it are pruned: Wanda's own procedure.
        tokens: with `sequential`, as in `calibrate`.

    A matrix that no token reached (an expert that was never chosen) has only scores of 0, among which position alone would decide.
    With `remove="highest"` it is left as it was and takes no part in a comparison across the model; with "lowest" the counts hold for
    it too, as in Wanda. Both warn and name it.

    Returns:
        An Edit, on the CPU: one bit for each weight of the pruned layers and the original value of each removed one.

    Raises:
        HftcoreError: energies that fit no layer or are zero in all, a pattern that fits no shape, NaN or infinity (named by layer and
            index).

    Source: score and row scope of Sun et al. 2023 (arXiv:2306.11695); `minus` is the set difference of Wei et al. 2024
    (arXiv:2402.05162), here on Wanda scores; `reference` is this project's own.

    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
    >>> edit = prune(layer, Energy({"": torch.ones(4)}), Pattern("50%"))
    >>> layer.weight.data
    tensor([[0., 0., 3., 4.],
            [4., 3., 0., 0.]])
    """
    if score not in ("wanda", "magnitude", "random"):
        raise HftcoreError(f"score must be 'wanda', 'magnitude' or 'random', got {score!r}")
    pattern = Pattern.of(pattern)
    if sequential:
        if energy is None or isinstance(energy, Energy):
            raise HftcoreError(
                "sequential=True calibrates block by block: pass the calibration batches in place of an Energy"
            )
        if pattern.scope == "model":
            raise HftcoreError(
                'scope "model" compares all layers at once, sequential=True prunes block by block: choose one'
            )
    elif not isinstance(energy, Energy) and (energy is not None or score == "wanda"):
        raise HftcoreError(
            f"energy must be an Energy (from hftcore.calibrate), got {type(energy).__name__}; batches need sequential=True"
        )
    if isinstance(energy, Energy):
        layers = energy_layers(model, energy, targets, exclude)
        if score == "wanda":
            refuse_unmeasured(energy)
    else:
        layers = find_layers(model, "all-linear" if targets is None else targets, exclude)
    others = None if reference is None else reference_weights(reference, layers)
    if others is not None and all(_is_unchanged(layer, others) for layer in layers):
        warnings.warn(
            "reference equals the model in every layer to prune, so nothing changes: pass the model before fine-tuning",
            stacklevel=2,
        )
    if minus is not None:
        minus = _benign(minus)
        check_energy(minus[0], layers, "minus")
    edit = Edit(recipe=_recipe(pattern, score, seed, reference, minus, sequential, tokens))
    job = _Job(model, edit, pattern, others, score, seed, minus)
    with torch.no_grad(), job.undone_on_failure():
        if energy is None or isinstance(energy, Energy):
            job.prune(layers, energy or Energy())
        else:
            for block, measured in blockwise_energy(model, energy, layers, tokens):
                job.prune(block, measured)
    job.tell_idle()
    return edit


def _benign(minus: tuple[Energy, Pattern | str]) -> tuple[Energy, Pattern]:
    if not (isinstance(minus, tuple) and len(minus) == 2 and isinstance(minus[0], Energy)):
        raise HftcoreError(f"minus must be (Energy, Pattern) of benign data, got {type(minus).__name__} {minus!r:.60}")
    return minus[0], Pattern.of(minus[1])


def _recipe(
    pattern: Pattern,
    score: str,
    seed: int,
    reference: object,
    minus: tuple[Energy, Pattern] | None,
    sequential: bool,
    tokens: str,
) -> dict[str, Any]:
    recipe: dict[str, Any] = {"method": "prune", "pattern": str(pattern), "score": score}
    if score == "random":
        recipe["seed"] = seed
    if reference is not None:
        recipe["reference"] = True
    if minus is not None:
        recipe["minus"] = str(minus[1])
    if sequential:
        recipe |= {"sequential": True, "tokens": tokens}
    return recipe


class _Job:
    """One call of `prune`: the choices, and the edit it fills."""

    def __init__(
        self,
        model: nn.Module,
        edit: Edit,
        pattern: Pattern,
        others: Mapping[str, Tensor] | None,
        score: Score,
        seed: int,
        minus: tuple[Energy, Pattern] | None,
    ) -> None:
        self.model, self.edit, self.pattern, self.others = model, edit, pattern, others
        self.score, self.seed, self.minus = score, seed, minus
        self.idle: list[str] = []
        self.scratch = torch.empty(0, dtype=torch.float32)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Restore what was changed when the block ends by an exception, Ctrl-C included."""
        try:
            yield
        except BaseException:
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            for name, entry in reversed(self.edit.tensors.items()):
                revert_tensor_(parameters[name].data, entry)
            raise

    def prune(self, layers: list[Layer], energy: Energy) -> None:
        """Prune the layers, in position order."""
        chosen = self._choice(layers, energy, self.pattern, self.score)
        spared = None
        if self.minus is not None:
            spared = self._choice(layers, *self.minus, "wanda")
        for layer in layers:
            if self.score == "wanda":
                self.idle += energy.idle(layer.name).values()
            masks = chosen(layer)
            if spared is not None:
                masks = (mask & ~spare for mask, spare in zip(masks, spared(layer), strict=True))
            parameter = getattr(layer.module, layer.parameter).data
            other = None if self.others is None else self.others[layer.tensor]
            entry = record(layer.tensor, parameter, layer.transposed, masks, other)
            self.edit.tensors[layer.tensor] = entry
            apply_tensor_(parameter, entry)
            self.edit.tensors[layer.tensor] = replace(entry, fingerprint_after=ops.fingerprint(parameter))

    def tell_idle(self) -> None:
        """Warn of matrices that no token reached, and say what became of them."""
        if not self.idle:
            return
        fate = "was left as it was" if self.pattern.invert else "was pruned by position alone, as all its scores are 0"
        if self.pattern.invert:
            self.edit.recipe["untouched"] = self.idle
        more = f" and {len(self.idle) - 8} more" if len(self.idle) > 8 else ""
        warnings.warn(f"what no token reached {fate}: {', '.join(self.idle[:8])}{more}", stacklevel=3)

    def _choice(
        self, layers: list[Layer], energy: Energy, pattern: Pattern, score: Score
    ) -> Callable[[Layer], Iterator[Tensor]]:
        """A maker of the masks of a layer, one for each of its matrices."""
        if pattern.scope != "model":
            return lambda layer: self._masks(layer, energy, pattern, score)
        return self._model_masks(layers, energy, pattern, score)

    def _scored(self, layer: Layer, index: int, energy: Energy, score: Score) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weight, energy, reference) of one matrix as the selection sees them."""
        weight = layer.weight[index] if layer.is_fused else layer.weight
        reference = None
        if self.others is not None:
            reference = matrices(self.others[layer.tensor], layer.transposed)[index].to(weight.device)
        if score != "wanda":
            measured = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
        else:
            measured = energy[layer.name][index] if layer.is_fused else energy[layer.name]
            measured = measured.to(weight.device)
        if score == "random":
            if Part(weight, measured, reference).call("nonfinite"):
                ops.prune_mask(weight, measured, Pattern(0.0), reference)  # which refuses it, by index
            label = f"{layer.tensor}[{index}]" if layer.is_fused else layer.tensor
            weight, reference = self._uniform(weight, f"{self.seed}:{label}"), None
        return weight, measured, reference

    def _uniform(self, like: Tensor, seed: str) -> Tensor:
        """Scores from a generator seeded by text, the same on every device; they hold until the next call."""
        size = like.numel()
        if self.scratch.numel() < size:
            # one buffer for all: its pieces between what the edit keeps would leave holes in the heap
            self.scratch = torch.empty(size, dtype=torch.float32)
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))
        return torch.rand(like.shape, generator=generator, out=self.scratch[:size].view(like.shape)).to(like.device)

    def _left_alone(self, layer: Layer, energy: Energy, pattern: Pattern, score: Score) -> Collection[int]:
        """The matrices of a layer that take no part: with `remove="highest"` those that no token reached, whose scores are all 0."""
        return energy.idle(layer.name) if score == "wanda" and pattern.invert else ()

    def _masks(self, layer: Layer, energy: Energy, pattern: Pattern, score: Score) -> Iterator[Tensor]:
        left_alone = self._left_alone(layer, energy, pattern, score)
        for index in range(_count(layer)):
            if index in left_alone:
                yield _empty_mask(layer)
                continue
            try:
                weight, measured, reference = self._scored(layer, index, energy, score)
                yield ops.prune_mask(weight, measured, pattern, reference)
            except HftcoreError as error:
                raise type(error)(f"{layer.tensor}: {str(error).removeprefix(f'{layer.tensor}: ')}") from None

    def _model_masks(
        self, layers: list[Layer], energy: Energy, pattern: Pattern, score: Score
    ) -> Callable[[Layer], Iterator[Tensor]]:
        """A maker of the masks of a layer under the one threshold of the whole model."""
        places: dict[tuple[str, int], int] = {}
        makers: list[Callable[[], Part]] = []
        sizes: list[tuple[int, int]] = []
        for layer in layers:
            left_alone = self._left_alone(layer, energy, pattern, score)
            for index in range(_count(layer)):
                if index not in left_alone:
                    places[layer.tensor, index] = len(makers)
                    makers.append(partial(self._part, layer, index, energy, score))
                    sizes.append((layer.weight.shape[-2], layer.weight.shape[-1]))
        count, invert = pattern.low_count(sum(rows * columns for rows, columns in sizes))
        try:
            found = find_cut(makers, sizes, count)
        except NonFiniteError:
            for layer in layers:  # the row-wise path names the layer and the index
                for _ in self._masks(layer, energy, Pattern(0.0), score):
                    pass
            raise

        def masks(layer: Layer) -> Iterator[Tensor]:
            for index in range(_count(layer)):
                mask = _empty_mask(layer)
                place = places.get((layer.tensor, index))
                if place is not None:
                    makers[place]().call("cut", found.key, found.quotas[place].to(mask.device), invert, mask)
                yield mask

        return masks

    def _part(self, layer: Layer, index: int, energy: Energy, score: Score) -> Part:
        weight, measured, reference = self._scored(layer, index, energy, score)
        return Part(weight, checks.norm(measured, weight), reference)


def _is_unchanged(layer: Layer, others: Mapping[str, Tensor]) -> bool:
    weight = getattr(layer.module, layer.parameter).data
    return torch.equal(weight, others[layer.tensor].to(weight.device))


def _count(layer: Layer) -> int:
    """How many matrices a layer holds."""
    return layer.weight.shape[0] if layer.is_fused else 1


def _empty_mask(layer: Layer) -> Tensor:
    """Of one matrix of a layer: nothing is removed."""
    *_, rows, columns = layer.weight.shape
    return torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=layer.weight.device)
