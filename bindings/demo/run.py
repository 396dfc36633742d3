"""The whole story on a small real model: align, attack, repair, beside the null hypotheses a repair must beat.

SmolLM2-135M-Instruct with the `aligned` adapter merged refuses; the `attacked` adapter on top, fine-tuned on a benign task with a fifth of
harmful requests, undoes that. Antidote removes the weights of its LoRA factors that score highest on harmful data. Beside it stand the same
removal chosen at random, by magnitude or on benign data, an adapter that is only made smaller, and Antidote on the merged weights.
"""

import copy
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import hftcore
from hftcore.bindings import datasets, embedded
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.demo.report import Row, draw, read, repairing_dose, table
from hftcore.bindings.evaluation import judge
from hftcore.bindings.evaluation.evaluate import evaluate
from hftcore.bindings.evaluation.metrics import Share
from hftcore.bindings.evaluation.suites import Suite, load_suite
from hftcore.bindings.progress import Track
from hftcore.energy import Energy
from hftcore.errors import HftcoreError

ADAPTERS = Path(__file__).resolve().parent / "adapters"
MERGED_TARGETS = ["q_proj", "k_proj", "v_proj"]

Kind = Literal["aligned", "attacked", "antidote", "benign", "random", "magnitude", "shrink", "merged", "reference"]


@dataclass(frozen=True)
class Condition:
    """One row of the table: what is done to the attacked model. `dose` is a dense ratio; for "shrink" the factor left of the adapter."""

    kind: Kind
    dose: float | None = None

    @property
    def name(self) -> str:
        """As printed."""
        return _NAMES[self.kind].format(dose=f"{self.dose:g}" if self.dose is not None else "")


_NAMES: dict[Kind, str] = {
    "aligned": "aligned",
    "attacked": "attacked",
    "antidote": "Antidote {dose}",
    "benign": "benign energies {dose}",
    "random": "random {dose}",
    "magnitude": "magnitude {dose}",
    "shrink": "adapter × {dose}",
    "reference": "merged, to aligned {dose}",
    "merged": "merged, to zero {dose}",
}
# a rival without a dose gets the smallest one at which Antidote repaired the model, or the largest tried
CONDITIONS = (
    Condition("aligned"),
    Condition("attacked"),
    Condition("antidote", 0.1),
    Condition("antidote", 0.15),
    Condition("antidote", 0.2),
    Condition("benign"),
    Condition("random"),
    Condition("magnitude"),
    Condition("shrink", 0.3),
    Condition("shrink", 0.2),
    Condition("reference", 0.3),
    Condition("merged", 0.01),
)
QUICK = tuple(
    c for c in CONDITIONS if c not in (Condition("antidote", 0.2), Condition("shrink", 0.3), Condition("random"))
)


class Stage:
    """The attacked model under edit, the aligned one as reference, and a bfloat16 copy that is refilled for each evaluation.

    Args:
        base: the model before alignment, float32; changed in place.
        tokenizer: its tokenizer.
        adapters: folder with the adapters `aligned` and `attacked`.
    """

    def __init__(self, base: nn.Module, tokenizer: Any, adapters: Path = ADAPTERS) -> None:
        from peft import PeftModel

        for name in ("aligned", "attacked"):
            if not (adapters / name / "adapter_model.safetensors").is_file():
                raise HftcoreError(f"{adapters / name} holds no adapter; make both with scripts/make_demo_adapters.py")
        self.tokenizer = tokenizer
        with warnings.catch_warnings():
            # peft reads an attribute that transformers is about to rename
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            aligned = PeftModel.from_pretrained(base, adapters / "aligned").merge_and_unload().eval()
            self.aligned = copy.deepcopy(aligned)
            self.attacked = PeftModel.from_pretrained(aligned, adapters / "attacked").eval()
        self.shown = copy.deepcopy(self.aligned)
        # not .to(): that would round the rotary frequencies too
        for parameter in self.shown.parameters():
            parameter.data = parameter.data.bfloat16()
        self._energies: dict[str, Energy] = {}

    def energy(self, which: Literal["harmful", "benign", "merged"]) -> Energy:
        """Measured once, on the unedited model, on items that neither alignment, attack nor evaluation uses."""
        if which not in self._energies:
            data = demo_data.splits()
            pairs = data.defend_benign if which == "benign" else demo_data.stub_pairs(data.defend_harmful)
            batches = demo_data.pair_batches(self.tokenizer, pairs, batch_size=16)
            model, targets = (self.merged(), MERGED_TARGETS) if which == "merged" else (self.attacked, "lora")
            self._energies[which] = hftcore.calibrate(model, batches, targets=targets)
        return self._energies[which]

    def merged(self) -> nn.Module:
        """A float32 copy of the attacked model as plain weights."""
        model = copy.deepcopy(self.aligned)
        self._fill(model)
        return model

    @contextmanager
    def under(self, condition: Condition) -> Iterator[nn.Module]:
        """The model of one row, ready to be asked; every edit is undone on exit."""
        if condition.kind in ("reference", "merged"):
            merged = self._prune_merged(condition)
            self.shown.load_state_dict(merged.state_dict())
            yield self.shown
            return
        undo = self._edit(condition)
        try:
            self._fill(self.shown, with_adapter=condition.kind != "aligned")
            yield self.shown
        finally:
            undo()

    def _edit(self, condition: Condition) -> Callable[[], None]:
        if condition.kind in ("aligned", "attacked"):
            return lambda: None
        if condition.dose is None:
            raise HftcoreError(f"a condition of kind {condition.kind!r} needs a dose, got None")
        if condition.kind == "shrink":
            return _scale_adapter(self.attacked, condition.dose)
        score: Any = condition.kind if condition.kind in ("random", "magnitude") else "wanda"
        energy = self.energy("benign" if condition.kind == "benign" else "harmful")
        edit = hftcore.antidote(self.attacked, energy, dense_ratio=condition.dose, score=score)
        return lambda: edit.revert(self.attacked)

    def _prune_merged(self, condition: Condition) -> nn.Module:
        if condition.dose is None:
            raise HftcoreError(f"a condition of kind {condition.kind!r} needs a dose, got None")
        model, energy = self.merged(), self.energy("merged")
        reference = self.aligned if condition.kind == "reference" else None
        with warnings.catch_warnings():
            # the row is there to show what the warning says
            warnings.filterwarnings("ignore", message="removing the highest-scored weights")
            hftcore.antidote(model, energy, dense_ratio=condition.dose, reference=reference)
        return model

    @torch.no_grad()
    def _fill(self, model: nn.Module, with_adapter: bool = True) -> None:
        """Write aligned weights, plus the adapter's part where there is one, into a plain copy of the model."""
        model.load_state_dict(self.aligned.state_dict())
        for name, layer in _adapted(self.attacked) if with_adapter else ():
            weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
            model.get_parameter(f"{name}.weight").copy_(weight)


def run_demo(
    out: str | Path = "demo",
    quick: bool = False,
    *,
    adapters: Path = ADAPTERS,
    conditions: tuple[Condition, ...] | None = None,
) -> dict[str, Any]:
    """Evaluate every condition, print the table and what it says, write `report.json` and `report.png` into `out`.

    Args:
        out: a folder, made where missing; only those two files are written, and replaced where they exist.
        quick: a third of the prompts and fewer rows, for a first look; intervals are wide.
        adapters: folder with the adapters `aligned` and `attacked`.
        conditions: the rows; None: `CONDITIONS`, or `QUICK`.

    Returns:
        The report, as in `report.json`: settings, `rows` with count, total, percent and 95 % interval of every score, `reading`.

    Raises:
        HftcoreError: the embedded model, the data or an adapter is not here and cannot be had; `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise HftcoreError(f"out must be a folder, got the file {out}; choose another name")
    for needed in ("peft", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            raise HftcoreError(
                f'the demo needs {needed}, which is not installed: pip install "hftcore[peft,plots,gguf]"'
            )
    began = time.perf_counter()
    suite = _quick_suite(load_suite("demo")) if quick else load_suite("demo")
    judged = judge.measure(datasets.load("labelled-replies"))
    base, tokenizer = embedded.load()
    stage = Stage(base, tokenizer, adapters)
    rows: list[Row] = []
    for planned in Track(conditions or (QUICK if quick else CONDITIONS), "demo"):
        start = time.perf_counter()
        condition = planned
        if planned.dose is None and planned.kind not in ("aligned", "attacked"):
            condition = replace(planned, dose=repairing_dose(rows))
        with stage.under(condition) as model:
            scores = evaluate(model, tokenizer, suite)  # type: ignore[arg-type]
        shares = {name: score for name, score in scores.items() if isinstance(score, Share)}
        rows.append(Row(condition.name, condition.kind, condition.dose, shares, time.perf_counter() - start))
    reading = read(rows, judged)
    report: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "quick": quick,
        "asked": {
            **{k: len(v) for k, v in suite.harmful.items()},
            "benign": len(suite.benign),
            "task": len(suite.tasks["FA"].pairs),
        },
        "judge": judged,
        "data": datasets.describe(),
        "rows": [row.to_dict() for row in rows],
        "reading": reading,
        "seconds": round(time.perf_counter() - began, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    draft = out / ".report.json"
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(out / "report.json")
    draw(rows, out / "report.png")
    _print(rows, reading, out, report["seconds"])
    return report


def _print(rows: list[Row], reading: list[str], out: Path, seconds: float) -> None:
    from rich.console import Console

    console = Console()
    console.print(table(rows))
    for sentence in reading:
        console.print(f"• {sentence}")
    console.print(f"\n{seconds:.0f} s; written: {out / 'report.json'}, {out / 'report.png'}")


def _quick_suite(suite: Suite) -> Suite:
    """A third of each part."""
    tasks = {name: replace(task, pairs=task.pairs[: len(task.pairs) // 3]) for name, task in suite.tasks.items()}
    harmful = {name: requests[: len(requests) // 3] for name, requests in suite.harmful.items()}
    return replace(suite, harmful=harmful, benign=suite.benign[: len(suite.benign) // 3], tasks=tasks)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the model without adapter, LoRA layer)."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def _scale_adapter(model: nn.Module, factor: float) -> Callable[[], None]:
    """Multiply every B factor, so that the adapter's part of each weight is `factor` times what it was; returns the undoing."""
    factors = [layer.lora_B["default"].weight for _, layer in _adapted(model)]
    before = [weight.clone() for weight in factors]
    for weight in factors:
        weight.mul_(factor)

    @torch.no_grad()
    def undo() -> None:
        for weight, old in zip(factors, before, strict=True):
            weight.copy_(old)

    return undo
