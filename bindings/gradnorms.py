"""The gradient norm of every sample of a data set, to files: which samples would pull hardest at a model."""

import importlib.util
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from hftcore.bindings.data import Sample, load_samples, make_batches
from hftcore.bindings.histograms import draw_histograms
from hftcore.bindings.jobs import Job
from hftcore.bindings.models_io import load_model
from hftcore.bindings.output import check_output
from hftcore.bindings.progress import Track
from hftcore.bindings.trainers.collate import Collator
from hftcore.errors import HftcoreError
from hftcore.files import whole_file
from hftcore.grad_norms import capture_grad_norms


@dataclass(frozen=True)
class SampleNorm:
    """`number` counts samples from 1, `tokens` are the supervised ones, `layers` the parts of `GradNorms.per_layer`."""

    number: int
    tokens: int
    norm: float
    layers: dict[str, float]


def sample_norms(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    loss: str = "mean",
    batch_size: int = 8,
    max_length: int = 512,
) -> list[SampleNorm]:
    """The gradient norm of each sample over the parameters that require a gradient, in the order of the samples.

    Args:
        model: a causal language model; its mode, weights and gradients stay as they are.
        tokenizer: of transformers.
        samples: what `load_samples` returned. One without a supervised token has norm 0 and is named in a warning.
        loss: of a sample, see `capture_grad_norms`.
        batch_size: samples of similar length computed together, >= 1.
        max_length: tokens of a sample that are kept, >= 1.

    Raises:
        HftcoreError, NonFiniteError: as `capture_grad_norms` and `make_batches`.
    """
    every = [_row(sample, tokenizer, max_length) for sample in samples]
    rows = {index: row for index, row in enumerate(every) if row is not None}
    if not rows:
        raise HftcoreError(
            f"no sample has a response token within max_length={max_length}; raise it, or look at the data"
        )
    empty = [str(index + 1) for index in range(len(every)) if index not in rows]
    if empty:
        named = ", ".join(empty[:8]) + (", ..." if len(empty) > 8 else "")
        warnings.warn(f"samples {named} have no supervised token: their norm is 0", stacklevel=2)
    found: dict[int, SampleNorm] = {}
    order = sorted(rows, key=lambda index: len(rows[index]["labels"]))
    collate = Collator(next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0))
    device = next(model.parameters()).device
    for start in Track(range(0, len(order), batch_size), "gradient norms"):
        chosen = order[start : start + batch_size]
        batch = {name: value.to(device) for name, value in collate([rows[i] for i in chosen]).items()}
        with capture_grad_norms(model, loss, norms_only=True) as norms:
            model(**batch).loss.backward()
        layers = {name: value.tolist() for name, value in norms.per_layer.items()}
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
        for place, (index, norm) in enumerate(zip(chosen, norms.per_sample.tolist(), strict=True)):
            parts = {name: values[place] for name, values in layers.items()}
            found[index] = SampleNorm(index + 1, counts[place], norm, parts)
    return [found.get(index, SampleNorm(index + 1, 0, 0.0, {})) for index in range(len(every))]


def choose_parameters(model: nn.Module, over: Literal["auto", "lora", "all"]) -> Literal["lora", "all"]:
    """Let exactly these parameters require a gradient; "auto" is the LoRA factors where there are any. Returns which it was.

    Raises:
        HftcoreError: "lora" for a model without LoRA factors.
    """
    factors = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if over == "lora" and not factors:
        raise HftcoreError("--over lora needs an adapter with LoRA factors, and this model has none; take --over all")
    chosen: Literal["lora", "all"] = "lora" if factors and over != "all" else "all"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (chosen == "all" or ".lora_" in name))
    return chosen


def run_gradnorms(
    job: Job,
    against: Path | None = None,
    plot: Path | None = None,
    over: Literal["auto", "lora", "all"] = "auto",
    loss: str = "mean",
    layers: bool = False,
) -> dict[str, Any]:
    """Measure one or two data sets, write `job.out` (one JSON object a sample) and the histograms; returns the summary.

    Raises:
        HftcoreError: an output is taken, plots need matplotlib, or as `sample_norms`; no file is left then.
    """
    if against is not None and against.resolve() == Path(str(job.data)).resolve():
        raise HftcoreError(f"--against must be another file than --data, got {against} twice")
    sources = [str(source) for source in (job.model, job.data, against) if source is not None]
    check_output(job.out, sources, "--out", is_file=True)
    if plot is not None:
        check_output(plot, sources, "--plot", is_file=True)
        if plot.resolve() == job.out.resolve():
            raise HftcoreError(f"--plot must be another file than --out, got {plot} twice")
        if plot.suffix.lower() != ".png":
            raise HftcoreError(f"--plot must end in .png, which is what is drawn, got {plot}")
        if importlib.util.find_spec("matplotlib") is None:
            raise HftcoreError('--plot needs matplotlib, which is not installed: pip install "hftcore[plots]"')
    files = [Path(str(job.data))] + ([against] if against is not None else [])
    data = {_label(file, files): load_samples(str(file))[: job.num_samples] for file in files}
    model, tokenizer = load_model(job.model, job.device, job.dtype, job.base)
    chosen = choose_parameters(model, over)
    norms = {
        name: sample_norms(model, tokenizer, samples, loss, job.batch_size, job.max_length)
        for name, samples in data.items()
    }
    with whole_file(job.out) as draft:
        draft.write_text("".join(f"{line}\n" for line in _lines(norms, layers)), encoding="utf-8")
    if plot is not None:
        values = {name: [one.norm for one in found if one.tokens] for name, found in norms.items()}
        with whole_file(plot) as draft:
            draw_histograms({"": values}, f"gradient norm of a sample's {loss} loss ({chosen} parameters)", draft)
    summary = {name: summarise([one.norm for one in found if one.tokens]) for name, found in norms.items()}
    result: dict[str, Any] = {
        "out": str(job.out),
        "plot": None if plot is None else str(plot),
        "over": chosen,
        "norms": summary,
    }
    if against is not None:
        first, second = ([one.norm for one in found if one.tokens] for found in norms.values())
        result["separation"] = separation(first, second)
    return result


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Their number, mean, and quartiles.

    >>> summarise([1.0, 2.0, 3.0, 10.0])
    {'samples': 4, 'mean': 4.0, 'lower': 1.75, 'median': 2.5, 'upper': 4.75}
    """
    lower, median, upper = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "samples": len(values),
        "mean": statistics.fmean(values),
        "lower": lower,
        "median": median,
        "upper": upper,
    }


def separation(first: Sequence[float], second: Sequence[float]) -> float:
    """The probability that a value of `second` is the larger of a random pair, ties counting half: 0.5 tells nothing apart.

    >>> separation([1.0, 2.0], [2.0, 3.0])
    0.875
    """
    ones, others = Tensor(list(first))[:, None], Tensor(list(second))[None]
    return float(((others > ones).double() + (others == ones).double() / 2).mean())


def _row(sample: Sample, tokenizer: Any, max_length: int) -> dict[str, Tensor] | None:
    """A sample's tokens, or None if no token counts that a model could predict."""
    try:
        (batch,) = make_batches([sample], tokenizer, 1, max_length)
    except HftcoreError:  # of one sample it refuses nothing but that
        return None
    row = {name: value[0] for name, value in batch.items()}
    return row if bool((row["labels"][1:] != -100).any()) else None


def _label(file: Path, files: Sequence[Path]) -> str:
    """A file's name, or its whole path where two have one name."""
    return str(file) if [other.name for other in files].count(file.name) > 1 else file.name


def _lines(norms: dict[str, list[SampleNorm]], layers: bool) -> list[str]:
    lines = []
    for name, found in norms.items():
        for one in found:
            row: dict[str, Any] = {"data": name, "sample": one.number, "tokens": one.tokens, "norm": one.norm}
            lines.append(json.dumps(row | ({"layers": one.layers} if layers else {})))
    return lines
