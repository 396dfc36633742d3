"""Prune a checkpoint folder without loading it: the same mask, Edit and weights as in memory, bit for bit."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hftcore.bindings.checkpoints.pruning import Pruning, digest_sources
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import StoredTensor
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, Targets, find_layers
from hftcore.matching import energy_layers, refuse_unmeasured
from hftcore.pattern import Pattern


def prune_folder(
    model: str | Path,
    energy: Energy | None,
    pattern: Pattern | str,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    score: Literal["wanda", "magnitude"] = "wanda",
    targets: Targets | None = None,
    exclude: Targets | None = None,
    edit_only: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Edit:
    """Write to `out` the pruned copy of a checkpoint folder, with its Edit in `out/edit`: what `hftcore.prune` does in memory.

    Weights are read, selected and written block by block, file by file, in the dtype of the files; other tensors and files are copied
    byte for byte, and `hftcore_manifest.json` is added. Memory does not grow with the model: 75 to 190 MB beside what importing the
    libraries takes. A killed call is continued by the same call (see `hftcore.resumable.resumable_folder`).

    Args:
        model: a folder with `config.json` and `.safetensors` files, sharded or not; experts fused or one by one.
        energy: as for `hftcore.prune`. None for score "magnitude".
        pattern: a `Pattern` or its text.
        out: the folder to make; it must not exist, or be empty.
        reference: a folder of the same kind: the score is that of the difference to its weights, removed weights take its values.
        score: "wanda" or "magnitude".
        targets, exclude: as for `hftcore.prune`.
        edit_only: make `out` the folder of the Edit alone.
        recipe: what the Edit's recipe says beside or instead of what `hftcore.prune` would write.

    Returns:
        The Edit, its tensors mapped from `out`.

    Raises:
        HftcoreError: as `hftcore.prune`; a damaged or quantised checkpoint; `out` is taken. Nothing is left then.
        OSError: the disk is full, for example; the same call continues once there is room.
    """
    pattern = Pattern.of(pattern)

    def find(folder: Path, stored: Mapping[str, StoredTensor]) -> list[Layer]:
        skeleton = load_skeleton(folder, stored)
        if energy is not None:
            return energy_layers(skeleton, energy, targets, exclude)
        return find_layers(skeleton, "all-linear" if targets is None else targets, exclude)

    _check_score(energy, score)
    pruning = Pruning(model, reference, find, pattern, out, edit_only)
    measured = energy if score == "wanda" else None
    if measured is not None:
        refuse_unmeasured(measured)
    idle = [label for layer in pruning.layers for label in (measured.idle(layer.name).values() if measured else ())]
    sources = pruning.sources(measured)
    told = pruning.recipe(score, idle if pattern.invert else []) | dict(recipe or {})
    edit = pruning.run(sources, told, {"energy": digest_sources(sources)})
    tell_idle(idle, pattern)
    return edit


def _check_score(energy: Energy | None, score: str) -> None:
    if score not in ("wanda", "magnitude"):
        raise HftcoreError(f"score must be 'wanda' or 'magnitude' on a checkpoint folder, got {score!r}")
    if energy is None and score == "wanda":
        raise HftcoreError("energy must be an Energy (from hftcore.calibrate) for score 'wanda', got None")


def tell_idle(idle: Sequence[str], pattern: Pattern) -> None:
    """Warn of the matrices that no token reached, if there are any."""
    if not idle:
        return
    fate = "was left as it was" if pattern.invert else "was pruned by position alone, as all its scores are 0"
    more = f" and {len(idle) - 8} more" if len(idle) > 8 else ""
    warnings.warn(f"what no token reached {fate}: {', '.join(idle[:8])}{more}", stacklevel=3)
