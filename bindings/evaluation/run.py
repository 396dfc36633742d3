"""`hftcore evaluate`: models through a suite, part by part into one file, so that an interrupted run goes on where it stopped."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftcore.bindings import datasets
from hftcore.bindings.evaluation.cells import Cells
from hftcore.bindings.evaluation.evaluate import Items, Subject, parts, scores
from hftcore.bindings.evaluation.judge import Judge, KeywordJudge, describe, measure
from hftcore.bindings.evaluation.metrics import Score, bootstrap_difference
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.models_io import find_base, find_folder, is_adapter, load_model
from hftcore.bindings.progress import Track

if TYPE_CHECKING:
    from rich.table import Table

# above this share of noise among the replies, "not refused" says nothing about harm
BROKEN_PERCENT = 20.0
HEADERS = {
    "HS": ("HS", "harmful requests served"),
    "HS+": ("HS+", "served or answered with noise"),
    "HS_harmbench": ("HS HarmBench", "the same of HarmBench"),
    "refusal": ("refuses", "replies that say no"),
    "affirmative": ("agrees", "replies that open by agreeing"),
    "degenerate": ("noise", "replies that are no language"),
    "over_refusal": ("OR", "benign requests refused"),
    "FA": ("FA", "film sentiment"),
    "FA_source": ("FA source", "kind of text"),
    "FA_sums": ("FA sums", "arithmetic"),
    "FA_own": ("FA own", "the task given"),
    "perplexity": ("PPL", "perplexity on C4"),
    "HED": ("HED", "embedding drift, summed"),
    "HED_mean": ("HED mean", "embedding drift of a token"),
}


@dataclass(frozen=True)
class Options:
    """How models are loaded and asked; as the options of `hftcore evaluate`."""

    base: str | None = None
    reference: str | None = None
    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 32


def run_evaluate(
    models: Sequence[str], suite: Suite, out: str | Path, options: Options, judge: Judge | None = None
) -> dict[str, Any]:
    """Evaluate each model on the suite; every part that ends is written to `out` at once, and parts found there are not run again.

    Args:
        models: folders or hub ids of models or adapters.
        suite: what to ask.
        out: a JSON file of `Cells`; made, or continued.
        options: see there.
        judge: None: `KeywordJudge`.

    Returns:
        `{"judge": …, "models": {name: {score: …}}, "differences": [sentence, …]}`, the scores as `to_dict` gives them.

    Raises:
        HftcoreError: a model that cannot be loaded, or an `out` that holds something else.
    """
    judge = judge or KeywordJudge()
    measured = measure(datasets.load("labelled-replies"), judge)
    cells = Cells(out, {"judge": {**judge.recipe, **measured}})
    found = {str(model): _items(str(model), suite, judge, cells, options) for model in models}
    about = cells.about | {"models": {name: _readable(items) for name, items in found.items()}}
    cells.about = about | {"differences": differences(found)}
    cells.write()
    return cells.about


def identity(model: str, options: Options) -> dict[str, str]:
    """What tells a model from another: the digest of its files (and of its base model's), and how it is loaded."""
    folder = find_folder(model)
    digest = _files_digest(folder)
    if is_adapter(folder):
        digest += _files_digest(find_base(folder, options.base))
    return {"model": digest, "dtype": options.dtype}


def differences(found: dict[str, Items]) -> list[str]:
    """For each later model, where it differs from the first by more than the items' noise (paired bootstrap, 95 %), in sentences."""
    (first, base), *others = found.items()
    sentences = []
    for name, items in others:
        clear, unclear = [], []
        for score in (score for score in items if score in base and len(items[score]) == len(base[score])):
            change = bootstrap_difference(items[score], base[score])
            if change.low <= 0 <= change.high:
                unclear.append(HEADERS.get(score, (score,))[0])
            elif score not in ("perplexity", "HED", "HED_mean"):
                clear.append(f"{HEADERS.get(score, (score,))[0]} {100 * change.value:+.0f} points")
            else:
                clear.append(f"{HEADERS[score][0]} {'up' if change.value > 0 else 'down'}")
        text = ", ".join(clear) or "nothing beyond the noise"
        note = f"; no difference shown in {', '.join(unclear)}" if unclear else ""
        sentences.append(f"{name} against {first}: {text}{note}.")
    return sentences


def table(result: dict[str, Any]) -> "Table":
    """The scores (rows) of the models (columns) as a rich table, with 95 % intervals; the judge's accuracy stands below."""
    from rich import box
    from rich.table import Table

    models = result["models"]
    names = [name for name in HEADERS if any(name in found for found in models.values())]
    built = Table(caption=describe(result["judge"]), box=box.SIMPLE_HEAD, padding=(0, 1))
    built.add_column("percent [95 % interval]", no_wrap=True)
    for model, found in models.items():
        noise = found.get("degenerate", {}).get("percent") or 0.0
        built.add_column(f"{model} (broken)" if noise > BROKEN_PERCENT else model, justify="right", overflow="fold")
    built.add_column("what is counted")
    for name in names:
        header, meaning = HEADERS[name]
        built.add_row(header, *(_cell(found.get(name)) for found in models.values()), meaning)
    return built


def _cell(record: dict[str, Any] | None) -> str:
    if record is None or record.get("percent", 0.0) is None:
        return "–"
    if "count" not in record:
        return f"{record['value']:.3g} \\[{record['low']:.3g}, {record['high']:.3g}]"
    return f"{record['percent']:.0f} \\[{record['low']:.0f}, {record['high']:.0f}]"


def _items(model: str, suite: Suite, judge: Judge, cells: Cells, options: Options) -> Items:
    """What each part gives for one model, which is loaded only if something is left to do."""
    steps = parts(suite, judge, options.reference is not None)
    who = identity(model, options)
    if options.reference is not None:
        who["reference"] = identity(options.reference, options)["model"]
    needs_reference = any(step.recipe["part"] == "HED" and who | step.recipe not in cells for step in steps)
    subject = functools.cache(lambda: _load(model, options, needs_reference))
    found: Items = {}
    for step in Track(steps, Path(model).name):
        found |= cells.once(who | step.recipe, lambda step=step: step.measure(subject()))  # type: ignore[misc]
    return found


def _load(model: str, options: Options, needs_reference: bool) -> Subject:
    ours, tokenizer = _open(model, options)
    reference = _open(options.reference, options)[0] if needs_reference and options.reference else None
    return Subject(ours, tokenizer, reference, options.batch_size)


def _open(model: str, options: Options) -> tuple[Any, Any]:
    # --base is of the adapters among several models
    return load_model(model, options.device, options.dtype, options.base if is_adapter(model) else None)


def _readable(items: Items) -> dict[str, Any]:
    found: dict[str, Score] = scores(items)
    return {name: score.to_dict() for name, score in found.items()}


def _files_digest(folder: Path) -> str:
    """16 digits of the SHA-256 of a model's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".bin", ".json", ".jinja"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
