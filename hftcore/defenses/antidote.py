"""Antidote: after fine-tuning, remove the weights that matter most for harmful data.

Huang et al., "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning", arXiv:2408.09600.
Where paper and published code differ is tabled in `docs/antidote.md`.
"""

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hftcore import checks
from hftcore.calibration import calibrate
from hftcore.edit import Edit
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Targets, find_layers
from hftcore.matching import energy_layers, reference_weights
from hftcore.pattern import Pattern, Remove, Scope
from hftcore.pruning import Score, prune

FULL_WEIGHTS = (
    "removing the highest-scored weights of full or merged matrices: on SmolLM2-135M one weight a row (ratio 0.001) already "
    "broke the model; target the LoRA factors, or pass reference="
)


def antidote(
    model: nn.Module,
    harmful_batches: Energy | Iterable[Mapping[str, Tensor]] | None,
    dense_ratio: float = 0.1,
    *,
    targets: Targets | None = None,
    exclude: Targets | None = None,
    scope: Scope = "row",
    remove: Remove = "highest",
    tokens: str = "all",
    average: str = "sum",
    score: Score = "wanda",
    seed: int = 0,
    reference: nn.Module | None = None,
    benign_batches: Energy | Iterable[Mapping[str, Tensor]] | None = None,
    benign_ratio: float | None = None,
) -> Edit:
    """Antidote in one call: score on harmful data, remove the top share of the weights, in place.

    The weights it is meant for are the factors of the fine-tuned LoRA adapter. On merged or full weights removing the top scores
    destroys small models even at one weight a row (the outlier features go first), so that call warns; pass `reference`.

    Args:
        model: the fine-tuned model; changed in place, and left as it was if anything fails.
        harmful_batches: harmful prompt-and-answer batches as for `calibrate`, or the Energy measured on them. None where the score
            needs no data ("magnitude", "random").
        dense_ratio: share removed, in [0, 1]: n - int(n * (1 - dense_ratio)) of each group of n. Headline setting of the paper: 0.1.
        targets: layers in PEFT's convention; None: the LoRA factors where the model has an adapter, else all linear layers.
        exclude: layers to leave out.
        scope: "row" (the published code), "matrix" or "model".
        remove: "highest" is Antidote; "lowest" is Wanda's pruning, for comparison.
        tokens: "all" (the published code counts prompt and answer) or "response".
        average: "sum": root of the summed squares over all tokens, which ranks as the published code's root mean square over samples;
            "sample-norm": the mean over samples of each sample's norm, the paper's Eq. 1.
        score: "wanda", or the papers' baselines "magnitude" and "random".
        seed: of the random score.
        reference: the model before fine-tuning: scores |W - W_ref|·norm, and removed weights take its values.
        benign_batches, benign_ratio: spare the weights that are also in the top `benign_ratio` (default: dense_ratio) for benign data.

    Returns:
        The Edit that was made; `edit.revert(model)` undoes it bit for bit.

    Raises:
        HftcoreError: as `calibrate` and `prune`.

    Source: Eqs. 1-3; group and counts from the published code (the paper leaves the group open).

    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 2, bias=False))
    >>> edit = antidote(model, Energy({"0": torch.ones(10)}), dense_ratio=0.1, reference=torch.nn.Sequential(torch.nn.Linear(10, 2)))
    >>> edit.removed
    2
    """
    _check_share("dense_ratio", dense_ratio)
    pattern = Pattern(dense_ratio, scope=scope, remove=remove)
    checks.model(model)
    chosen = default_targets(model) if targets is None else targets
    energy: Energy | None = None
    batches: Iterable[Mapping[str, Tensor]] | None = None
    if isinstance(harmful_batches, Energy):
        energy, average = harmful_batches, harmful_batches.average
        layers = energy_layers(model, energy, targets, exclude)
    else:
        layers = find_layers(model, chosen, exclude)
        if score == "wanda" and harmful_batches is None:
            raise HftcoreError("harmful_batches must be batches or an Energy for score 'wanda', got None")
        batches = harmful_batches if score == "wanda" else None
    if benign_ratio is not None and benign_batches is None:
        raise HftcoreError("benign_ratio needs benign_batches")
    if benign_ratio is not None:
        _check_share("benign_ratio", benign_ratio)
    if reference is not None:
        reference_weights(reference, layers)
    elif remove == "highest" and score != "random" and not all("lora_" in layer.name for layer in layers):
        warnings.warn(FULL_WEIGHTS, stacklevel=2)
    # the layers of a given energy are narrowed by what the caller asks for; one measured here already is
    restriction = chosen if energy is None else targets
    if batches is not None:
        energy = calibrate(model, batches, chosen, exclude, tokens=tokens, average=average)
    minus = None
    if benign_batches is not None:
        if not isinstance(benign_batches, Energy):
            where = chosen if energy is None else list(energy)
            benign_batches = calibrate(model, benign_batches, where, exclude, tokens=tokens, average=average)
        share = dense_ratio if benign_ratio is None else benign_ratio
        minus = benign_batches, Pattern(share, scope=scope, remove=remove)
    edit = prune(
        model,
        energy,
        pattern,
        reference=reference,
        score=score,
        seed=seed,
        minus=minus,
        targets=restriction,
        exclude=exclude,
    )
    edit.recipe |= {"method": "antidote", "dense_ratio": dense_ratio}
    if energy is not None:
        edit.recipe["average"] = average
        if not isinstance(harmful_batches, Energy):
            edit.recipe["tokens"] = tokens
    return edit


def _check_share(name: str, share: float) -> None:
    try:
        Pattern(share)
    except HftcoreError as error:
        raise HftcoreError(f"{name}: {error}") from None


def default_targets(model: nn.Module) -> str:
    """What `antidote` works on unless told: "lora" where the model has an adapter, else "all-linear"."""
    return "lora" if any(".lora_A." in name for name, _ in model.named_modules()) else "all-linear"
