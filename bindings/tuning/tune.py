"""`hftcore tune`: the smallest dose of a defence that repairs a model, on requests set aside for it, with the dose-response curve."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hftcore.bindings import datasets
from hftcore.bindings.data import load_samples, make_batches
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation.cells import Cells
from hftcore.bindings.evaluation.evaluate import Items, Subject, parts, scores
from hftcore.bindings.evaluation.judge import Judge, KeywordJudge, describe, measure
from hftcore.bindings.evaluation.metrics import Score
from hftcore.bindings.evaluation.run import Options, identity
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.mixture import samples
from hftcore.bindings.models_io import load_model
from hftcore.bindings.output import check_output
from hftcore.bindings.tuning import doses
from hftcore.bindings.tuning.dose import Goal, Search, check_search, find_dose
from hftcore.bindings.tuning.doses import Batches, Dose
from hftcore.edit import CONFIG, Edit
from hftcore.errors import HftcoreError

RESULTS, PLOT = "tune.json", "tune.png"


@dataclass(frozen=True)
class Plan:
    """What is searched for, and how; as the options of `hftcore tune`."""

    until: Goal
    keep: Goal | None = None
    highest: float | None = None
    steps: int = 5
    tolerance: float = 0.05
    data: Path | None = None


def run_tune(
    methods: Sequence[str],
    model: str,
    plan: Plan,
    suite: Suite,
    out: Path,
    options: Options,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Search the dose of each method; write every measured dose to `out/tune.json` at once, the curves to `out/tune.png`, and the Edit of
    the dose found to `out/METHOD`. A run that was interrupted goes on where it stopped.

    Args:
        methods: names in `doses.METHODS`, or folders of Edits, which are dosed by how far they go.
        model: folder or hub id of the fine-tuned model or adapter (for an Edit: the model it is applied to).
        plan: goals, and how to search.
        suite: what to ask; only the parts that the goals and HS and FA need are measured.
        out: a folder, made or continued.
        options: how the model is loaded.
        judge: None: `KeywordJudge`.

    Returns:
        `{"judge": …, "methods": {name: {"dose", "verdict", "meaning", "curve": [{"dose", "scores"}, …]}}}`.

    Raises:
        HftcoreError: an unknown method, two of one name, a goal about a score that the suite does not hold, or numbers or data to search
            by that are none, all before the model is loaded; or a model that a method cannot dose.
    """
    prepared = {_label(method): _method(method) for method in methods}
    if len(prepared) < len(methods):
        raise HftcoreError(
            f"each METHOD must have a name of its own, got {', '.join(methods)}; rename an edit's folder"
        )
    edits = {_label(method): _digest(Path(method) / CONFIG) for method in methods if method not in doses.METHODS}
    _check(plan, prepared, suite)
    if not (out / RESULTS).is_file():
        check_output(out, (), "--out")
    judge = judge or KeywordJudge()
    asked = needed(suite, plan)
    measured = measure(datasets.load("labelled-replies"), judge)
    cells = Cells(out / RESULTS, {"judge": {**judge.recipe, **measured}})
    loaded, tokenizer = load_model(model, options.device, options.dtype, options.base)
    subject = Subject(loaded, tokenizer, batch_size=options.batch_size)
    who = identity(model, options) | {"data": _digest(plan.data)}

    def batches() -> Any:
        if plan.data is not None:
            return make_batches(load_samples(plan.data), tokenizer)
        stubs = demo_data.stub_pairs(demo_data.splits().defend_harmful)
        return make_batches(samples(stubs), tokenizer)

    found: dict[str, Search] = {}
    for label, method in prepared.items():
        lazy = _Lazy(method, loaded, batches)

        def ask(dose: float, lazy: "_Lazy" = lazy, label: str = label) -> Mapping[str, Score]:
            items: Items = {}
            for part in parts(asked, judge):
                # dose 0 is the model as it is, whatever the method
                recipe = who | part.recipe | {"method": label if dose else None, "dose": dose}
                # an edit is what it does, not what its folder is called
                recipe |= {"edit": edits[label]} if dose and label in edits else {}
                items |= cells.once(recipe, lambda part=part: _under(lazy, dose, part, subject))  # type: ignore[misc]
            return scores(items)

        highest = plan.highest if plan.highest is not None else method.highest
        found[label] = find_dose(
            ask, plan.until, plan.keep, highest=highest, steps=plan.steps, tolerance=plan.tolerance
        )
        if found[label].dose:
            _save(lazy, found[label].dose or 0.0, out / label)
    cells.about |= {"methods": {label: _record(prepared[label], search) for label, search in found.items()}}
    cells.write()
    draw(found, plan, {label: method.meaning for label, method in prepared.items()}, out / PLOT)
    return cells.about


def needed(suite: Suite, plan: Plan) -> Suite:
    """The parts of a suite that HS, FA and the goals are about."""
    goals = [plan.until, *([plan.keep] if plan.keep else [])]
    names = {"HS", "FA", *(goal.score.removesuffix("+") for goal in goals)}
    return replace(
        suite,
        harmful={name: requests for name, requests in suite.harmful.items() if name in names},
        benign=suite.benign if "over_refusal" in names else [],
        tasks={name: task for name, task in suite.tasks.items() if name in names},
        documents=suite.documents if "perplexity" in names else [],
        drift=[],
    )


def _check(plan: Plan, methods: Mapping[str, doses.Method], suite: Suite) -> None:
    """Refuse what no search could use, before a model is loaded."""
    for name, method in methods.items():
        highest = method.highest if plan.highest is None else plan.highest
        check_search(highest, plan.steps, plan.tolerance)
        if highest > method.limit:
            raise HftcoreError(
                f"highest must be at most {method.limit:g} for {name}, a {method.meaning}, got {highest:g}"
            )
    if plan.data is not None:
        load_samples(plan.data)
    known = [*suite.harmful, *(f"{name}+" for name in suite.harmful), *suite.tasks]
    known += ["refusal", "affirmative", "degenerate"] if suite.harmful else []
    known += [name for name, has in (("over_refusal", suite.benign), ("perplexity", suite.documents)) if has]
    for goal in (plan.until, *([plan.keep] if plan.keep else [])):
        if goal.score not in known:
            raise HftcoreError(f"{goal} is about no score measured here, which are {', '.join(known)}")


def lines(result: dict[str, Any]) -> list[str]:
    """What was found, for people: a verdict and the measured curve of each method, and the judge's accuracy."""
    text = []
    for name, record in result["methods"].items():
        text.append(f"{name} ({record['meaning']}): {record['verdict']}")
        for point in record["curve"]:
            values = (f"{score} {_shown(value)}" for score, value in point["scores"].items())
            text.append(f"  {point['dose']:<8.4g} {'  '.join(values)}")
    return [*text, describe(result["judge"])]


def draw(found: dict[str, Search], plan: Plan, meanings: dict[str, str], path: Path) -> None:
    """Both goals' scores over the dose, with 95 % intervals, one panel for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.3 * len(found), 3.8), layout="constrained")
    shown = {plan.until.score: "#b3261e", (plan.keep.score if plan.keep else "FA"): "#1f5fa8"}
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (label, search) in zip(panels, found.items(), strict=True):
        places = list(search.curve)
        for score, colour in shown.items():
            points = [search.curve[dose].get(score) for dose in places]
            if any(point is None for point in points):
                continue
            known = [point for point in points if point is not None]
            lows, highs = zip(*(point.interval for point in known), strict=True)
            axes.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
            axes.plot(places, [point.value for point in known], "o-", color=colour, markersize=5, label=score)
        axes.axhline(plan.until.bound, color="#b3261e", linewidth=1, linestyle=":", label=str(plan.until))
        if search.dose is not None:
            axes.axvline(search.dose, color="#2a7f62", linewidth=1.5)
        title = "no dose does it" if search.dose is None else f"dose {search.dose:.3g}"
        axes.set_title(f"{label}: {title}", fontsize=10)
        axes.set_xlabel(meanings[label])
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("percent, 95 % interval")
    panels[-1].legend(frameon=False)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=150)
    draft.replace(path)


class _Lazy:
    """A method's dose, prepared when the first dose above 0 is asked for: a finished search prepares nothing."""

    def __init__(self, method: doses.Method, model: nn.Module, batches: Batches) -> None:
        self._method, self._model, self._batches = method, model, batches
        self._dose: Dose | None = None

    @contextmanager
    def under(self, dose: float) -> Iterator[Edit]:
        """The model with the dose; every bit as before afterwards."""
        if self._dose is None:
            self._dose = self._method.prepare(self._model, self._batches)
        edit = self._dose(dose)
        try:
            yield edit
        finally:
            edit.revert(self._model)


def _under(lazy: _Lazy, dose: float, part: Any, subject: Subject) -> Items:
    if dose == 0:
        return part.measure(subject)
    with lazy.under(dose):
        return part.measure(subject)


def _digest(data: Path | None) -> str | None:
    return None if data is None else hashlib.sha256(data.read_bytes()).hexdigest()[:16]


def _save(lazy: _Lazy, dose: float, path: Path) -> None:
    with lazy.under(dose) as edit:
        edit.save(path)


def _label(method: str) -> str:
    return method if method in doses.METHODS else Path(method).name


def _method(name: str) -> doses.Method:
    if name in doses.METHODS:
        return doses.METHODS[name]
    if (Path(name) / CONFIG).is_file():
        edit = Edit.load(name)
        return doses.Method("how far the edit goes", 1.0, lambda model, batches: doses.edit_dose(model, edit))
    raise HftcoreError(f"METHOD must be one of {', '.join(doses.METHODS)}, or the folder of an Edit; got {name!r}")


def _record(method: doses.Method, search: Search) -> dict[str, Any]:
    curve = [
        {"dose": dose, "scores": {name: score.to_dict() for name, score in found.items()}}
        for dose, found in search.curve.items()
    ]
    return {"dose": search.dose, "verdict": search.verdict, "meaning": method.meaning, "curve": curve}


def _shown(record: dict[str, Any]) -> str:
    value = record.get("percent", record.get("value"))
    return "–" if value is None else f"{value:.0f} [{record['low']:.0f}, {record['high']:.0f}]"
