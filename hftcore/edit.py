"""Edits: a change to a model's weights that can be saved, applied, and reverted bit for bit.

On disk an Edit is a folder: `edit.safetensors` with, for each tensor, the packed mask of what changed and the values before (and
after, where it is not zero), and `edit_config.json` with the recipe, shapes and fingerprints. Names are those of the parameters in
memory; masks are in [out, in] orientation, whatever the storage (Conv1D, transposed experts), experts one below the other.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hftcore import ops
from hftcore.errors import FingerprintError, HftcoreError
from hftcore.files import whole_folder
from hftcore.ops.fingerprints import fingerprint_text, fingerprint_total

CONFIG = "edit_config.json"
TENSORS = "edit.safetensors"
FORMAT = 1

fingerprint = ops.fingerprint


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor.

    Fields:
        shape: stored shape of the parameter, [M, N], [N, M] if transposed, or with the experts' axis in front.
        dtype: its name, "float32", "bfloat16" or "float16".
        transposed: stored [.., in, out].
        mask: packed, [rows, ceil(N / 8)] uint8 on the CPU, 1 = changed; rows = M, or E * M for fused experts.
        before: [R] the values under the mask before the edit.
        after: [R] those after it; None means zeros.
        fingerprint_before, fingerprint_after: of the whole tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    mask: Tensor
    before: Tensor
    after: Tensor | None
    fingerprint_before: str
    fingerprint_after: str


def matrices(tensor: Tensor, transposed: bool) -> list[Tensor]:
    """The [out, in] views of a stored weight: one, or one for each fused expert; a vector is one row."""
    oriented = tensor.transpose(-1, -2) if transposed else tensor
    if oriented.dim() < 2:
        oriented = oriented.view(1, -1)
    return [oriented] if oriented.dim() == 2 else list(oriented.unbind(0))


def apply_tensor_(tensor: Tensor, entry: TensorEdit) -> None:
    """Write the values after the edit into a stored tensor. The caller has checked its fingerprint."""
    _write(tensor, entry, entry.after)


def revert_tensor_(tensor: Tensor, entry: TensorEdit) -> None:
    """Write the values before the edit into a stored tensor. The caller has checked its fingerprint."""
    _write(tensor, entry, entry.before)


@torch.no_grad()
def _write(tensor: Tensor, entry: TensorEdit, values: Tensor | None) -> None:
    views = matrices(tensor.detach(), entry.transposed)
    start = 0
    for view, mask in zip(views, entry.mask.chunk(len(views)) if views else (), strict=True):
        part = None
        if values is not None:
            stop = start + ops.count_mask(mask)
            part = values[start:stop].to(view.device)
            start = stop
        ops.masked_put_(view, mask.to(view.device), part)


@dataclass
class Edit:
    """A reversible change to a model's weights. `hftcore.prune` and `hftcore.antidote` return one.

    Fields:
        tensors: parameter name -> `TensorEdit`.
        recipe: what made it (JSON values only).

    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> edit = prune(layer, Energy({"": torch.ones(4)}), Pattern("50%"))
    >>> edit.removed, edit.size
    (2, 4)
    >>> edit.revert(layer)
    """

    tensors: dict[str, TensorEdit] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """Number of weights changed."""
        return sum(entry.before.numel() for entry in self.tensors.values())

    @property
    def size(self) -> int:
        """Number of weights in the tensors touched."""
        return sum(torch.Size(entry.shape).numel() for entry in self.tensors.values())

    @property
    def sparsity(self) -> float:
        """Share of weights changed; 0 for an empty edit."""
        return self.removed / self.size if self.size else 0.0

    def __repr__(self) -> str:
        return f"Edit({len(self.tensors)} tensors, {self.removed} of {self.size} weights changed, {self.sparsity:.2%})"

    def apply(self, model: nn.Module) -> None:
        """Make the change on `model`, in place.

        Raises:
            FingerprintError: a tensor is not the one the edit was made for, or would not become what the edit made of it (the edit is
                damaged); nothing is changed.
            HftcoreError: the model has no such parameter; nothing is changed.
        """
        _all_or_none(self._checked(model, "fingerprint_before"), apply_tensor_, revert_tensor_, "fingerprint_after")

    def revert(self, model: nn.Module) -> None:
        """Undo the change on `model`, in place and bit for bit.

        Raises:
            FingerprintError: a tensor is not as the edit left it, or would not become what it was before (the edit is damaged); nothing
                is changed.
            HftcoreError: the model has no such parameter; nothing is changed.
        """
        _all_or_none(self._checked(model, "fingerprint_after"), revert_tensor_, apply_tensor_, "fingerprint_before")

    def scaled(self, factor: float) -> "Edit":
        """An Edit of the same tensors whose weights go `factor` times as far, each rounded once to its dtype.

        Args:
            factor: finite; 0 for an edit that changes nothing, 1 for this one, negative for the other way.

        Raises:
            HftcoreError: a factor that is not finite, or so large that a weight would be infinite (by name).

        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> edit = prune(layer, None, Pattern("50%"), score="magnitude")
        >>> edit.revert(layer)
        >>> half = edit.scaled(0.5)
        >>> half.apply(layer)
        >>> bool(half.tensors["weight"].after == half.tensors["weight"].before / 2)
        True
        """
        if not math.isfinite(factor):
            raise HftcoreError(f"factor must be a finite number, got {factor}")
        recipe = self.recipe | {"factor": factor * self.recipe.get("factor", 1.0)}
        return Edit({name: _scaled(name, entry, factor) for name, entry in self.tensors.items()}, recipe)

    def _checked(self, model: nn.Module, which: str) -> list[tuple[str, Tensor, TensorEdit]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = []
        for name, entry in self.tensors.items():
            if name not in parameters:
                raise HftcoreError(
                    f"the model has no parameter {name!r}, which this edit changes; is it the model the edit was made on?"
                )
            parameter = parameters[name].data
            check_fingerprint(name, ops.fingerprint(parameter), entry, which)
            if not _holds(parameter, entry, entry.before if which == "fingerprint_before" else entry.after):
                raise _damaged(name)
            pairs.append((name, parameter, entry))
        return pairs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: whole, or not at all. An older Edit there is replaced, anything else refused.

        Raises:
            HftcoreError: `path` exists and is not an Edit.
        """
        stored: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, entry in self.tensors.items():
            stored[f"{name}.mask"] = entry.mask.contiguous()
            stored[f"{name}.before"] = entry.before.contiguous()
            if entry.after is not None:
                stored[f"{name}.after"] = entry.after.contiguous()
            described[name] = {
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "transposed": entry.transposed,
                "changed": entry.before.numel(),
                "fingerprint_before": entry.fingerprint_before,
                "fingerprint_after": entry.fingerprint_after,
            }
        with whole_folder(path, replaces=(CONFIG, TENSORS)) as folder:
            save_file(stored, folder / TENSORS)
            (folder / CONFIG).write_text(config_text(self.recipe, described), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Edit":
        """Read a folder that `save` wrote.

        Raises:
            HftcoreError: no Edit there, an unknown format, or a damaged file, by name.
        """
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise HftcoreError(f"{folder} is not an Edit: it has no {CONFIG}")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise HftcoreError(f"{folder / CONFIG} has format {config['format']}, this version reads {FORMAT}")
            with safe_open(folder / TENSORS, framework="pt") as stored:
                tensors = {name: _entry(name, facts, stored) for name, facts in config["tensors"].items()}
            return cls(tensors, dict(config["recipe"].items()))
        except (
            json.JSONDecodeError,
            KeyError,
            TypeError,
            AttributeError,
            SafetensorError,
            OSError,
            UnicodeDecodeError,
        ) as error:
            raise HftcoreError(f"{folder} is not a readable Edit ({error}); make or copy it again") from error


def config_text(recipe: dict[str, Any], tensors: dict[str, Any]) -> str:
    """What `edit_config.json` holds."""
    return json.dumps({"format": FORMAT, "recipe": recipe, "tensors": tensors}, indent=2) + "\n"


def count_marks(mask: Tensor) -> int:
    """`ops.count_mask` of a mask that may be mapped from a file and larger than memory: by pieces whose temporaries are small."""
    return sum(ops.count_mask(part) for part in mask.reshape(-1).split(1 << 18))


def _all_or_none(
    pairs: list[tuple[str, Tensor, TensorEdit]],
    write: Callable[[Tensor, TensorEdit], None],
    undo: Callable[[Tensor, TensorEdit], None],
    wanted: str,
) -> None:
    """Write every tensor, which then has the fingerprint `wanted`; undo what was written when it has not, and when interrupted, or
    the model would be neither the one nor the other."""
    started = []
    try:
        for name, parameter, entry in pairs:
            started.append((parameter, entry))
            write(parameter, entry)
            if ops.fingerprint(parameter) != getattr(entry, wanted):
                raise _damaged(name)
    except BaseException:
        for parameter, entry in reversed(started):
            undo(parameter, entry)
        raise


def _holds(tensor: Tensor, entry: TensorEdit, values: Tensor | None) -> bool:
    """Whether the weights under the mask are `values` (None: zeros), bit for bit: writing those undoes any other."""
    views = matrices(tensor, entry.transposed)
    start = 0
    for view, mask in zip(views, entry.mask.chunk(len(views)) if views else (), strict=True):
        found = ops.masked_take(view, mask.to(view.device))
        part = torch.zeros_like(found) if values is None else values[start : start + found.numel()].to(found.device)
        if part.dtype != found.dtype or not torch.equal(part.view(torch.uint8), found.view(torch.uint8)):
            return False
        start += found.numel()
    return True


def _damaged(name: str) -> FingerprintError:
    return FingerprintError(
        f"the edit of {name} is damaged: it does not fit its own fingerprints; copy it again; nothing was changed"
    )


def _entry(name: str, facts: Mapping[str, Any], stored: Any) -> TensorEdit:
    keys = set(stored.keys())
    entry = TensorEdit(
        tuple(facts["shape"]),
        facts["dtype"],
        facts["transposed"],
        stored.get_tensor(f"{name}.mask"),
        stored.get_tensor(f"{name}.before"),
        stored.get_tensor(f"{name}.after") if f"{name}.after" in keys else None,
        facts["fingerprint_before"],
        facts["fingerprint_after"],
    )
    if not _fits_itself(entry):
        raise HftcoreError(
            f"the edit of {name!r} does not fit its own shape {facts['shape']} or dtype {entry.dtype}; copy it again"
        )
    marked = count_marks(entry.mask)
    if entry.before.shape != (marked,) or (entry.after is not None and entry.after.shape != (marked,)):
        raise HftcoreError(
            f"the edit of {name!r} marks {marked} weights but holds {entry.before.numel()} values; copy it again"
        )
    return entry


def _fits_itself(entry: TensorEdit) -> bool:
    """Whether a mask and values that were read can belong to a tensor of the shape and dtype they are said to."""
    shape = entry.shape
    if len(shape) > 3 or not all(type(size) is int and size >= 0 for size in shape):
        return False
    *outer, rows, columns = shape if len(shape) > 1 else (1, math.prod(shape))
    if entry.transposed:
        rows, columns = columns, rows
    given = (entry.before,) if entry.after is None else (entry.before, entry.after)
    return (
        entry.mask.dtype == torch.uint8
        and entry.mask.shape == (math.prod(outer) * rows, -(-columns // 8))
        and all(str(values.dtype) == f"torch.{entry.dtype}" for values in given)
    )


def _scaled(name: str, entry: TensorEdit, factor: float) -> TensorEdit:
    before = entry.before
    after = torch.zeros_like(before) if entry.after is None else entry.after
    if factor in (0, 1):
        # bit for bit: a sum would lose the sign of zero
        moved = after.clone() if factor else before.clone()
    else:
        moved = (before.double() + factor * (after.double() - before.double())).to(before.dtype)
    if not bool(moved.isfinite().all()):
        raise HftcoreError(f"factor {factor} makes weights of {name!r} infinite; take a smaller one")
    scaled = replace(entry, after=moved)
    # a fingerprint is a sum over elements, so those the edit leaves alone cancel in the difference of two others
    scratch = torch.zeros(entry.shape, dtype=moved.dtype)
    sums = []
    for write in (revert_tensor_, apply_tensor_):
        write(scratch, scaled)
        sums.append(fingerprint_total(ops.fingerprint(scratch)))
    total = fingerprint_total(entry.fingerprint_before) - sums[0] + sums[1]
    return replace(scaled, fingerprint_after=fingerprint_text(moved.dtype, entry.shape, total))


def check_fingerprint(name: str, found: str, entry: TensorEdit, which: str) -> None:
    """Refuse a tensor whose fingerprint is not `entry.<which>`, saying how it differs."""
    wanted = getattr(entry, which)
    if found == wanted:
        return
    other = "fingerprint_after" if which == "fingerprint_before" else "fingerprint_before"
    if found == getattr(entry, other):
        state = "the edit is already applied" if which == "fingerprint_before" else "the edit is not applied"
        raise FingerprintError(f"{name}: {state}; nothing was changed")
    raise FingerprintError(
        f"{name} has fingerprint {found}, the edit needs {wanted}: these are other weights; nothing was changed"
    )


def record(
    name: str, parameter: Tensor, transposed: bool, masks: Iterator[Tensor], reference: Tensor | None
) -> TensorEdit:
    """The entry for a parameter about to be changed under `masks` (one for each of its matrices): to zero or to `reference`."""
    packed, before, after = [], [], []
    others = None if reference is None else matrices(reference, transposed)
    for index, (view, mask) in enumerate(zip(matrices(parameter, transposed), masks, strict=True)):
        packed.append(mask.cpu())
        before.append(ops.masked_take(view, mask).cpu())
        if others is not None:
            after.append(ops.masked_take(others[index], mask.to(others[index].device)).cpu())
    return TensorEdit(
        tuple(parameter.shape),
        str(parameter.dtype).removeprefix("torch."),
        transposed,
        _joined(packed),
        _joined(before),
        _joined(after) if after else None,
        ops.fingerprint(parameter),
        "",
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other. One alone is not copied: short-lived copies between what an edit keeps leave holes in the heap,
    which took a sixth of a model of 400 MB."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def difference(before: Tensor, after: Tensor) -> TensorEdit:
    """The entry that turns `before` into `after`, two tensors of one shape and dtype, of at most three dimensions."""
    width = {2: torch.int16, 4: torch.int32}[before.element_size()]
    packed, old, new = [], [], []
    for one, other in zip(matrices(before.contiguous(), False), matrices(after.contiguous(), False), strict=True):
        mask = ops.pack_mask(one.view(width) != other.view(width))
        packed.append(mask.cpu())
        old.append(ops.masked_take(one, mask).cpu())
        new.append(ops.masked_take(other, mask).cpu())
    return TensorEdit(
        tuple(before.shape),
        str(before.dtype).removeprefix("torch."),
        False,
        torch.cat(packed),
        torch.cat(old),
        torch.cat(new),
        ops.fingerprint(before),
        ops.fingerprint(after),
    )
