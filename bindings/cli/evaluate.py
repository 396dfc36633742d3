"""`hftcore evaluate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hftcore.bindings.cli.options import AsJson, Base, Device, DType, LoadDType
from hftcore.bindings.cli.reporting import emit


@contextmanager
def continued(out: Path) -> Iterator[None]:
    """Say after Ctrl-C that what is done is kept, and leave with 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is in {out}, the same command goes on from there", err=True)
        raise typer.Exit(130) from None


class SuiteName(StrEnum):
    """The suites of `hftcore.bindings.evaluation.suites`."""

    quick = "quick"
    full = "full"
    validation = "validation"
    demo = "demo"
    immunization = "immunization"


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids of models or adapters.")],
    out: Annotated[Path, typer.Option(help="Results file, .json; an existing one is continued, not repeated.")],
    suite: Annotated[SuiteName, typer.Option(help="What to ask.")] = SuiteName.quick,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each part.")] = None,
    task: Annotated[
        Path | None, typer.Option(help="A task of your own, .jsonl with prompt and completion; scored as FA own.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before fine-tuning: embedding drift is measured against it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message. [default: the suite's]")] = None,
    judge: Annotated[
        str | None, typer.Option(help="A sequence classifier to judge replies, in place of keywords: folder or hub id.")
    ] = None,
    judge_labels: Annotated[str | None, typer.Option(help="Its labels that mean harm, a,b,...")] = None,
    judge_template: Annotated[
        str | None,
        typer.Option(help="Text it reads, with {prompt} and {reply}, as it was trained. [default: a pair of texts]"),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(help="YAML for --suite immunization: learning_rates, samples, steps, every, phi, margin."),
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Measure harmful score, refusals, task accuracy and perplexity of models.

    The harmful score comes from a judge whose agreement with people is printed with it."""
    from dataclasses import replace

    from hftcore.bindings.evaluation.model_judge import ModelJudge
    from hftcore.bindings.evaluation.run import Options, run_evaluate, table
    from hftcore.bindings.evaluation.suites import load_suite
    from hftcore.bindings.evaluation.tasks import task_from_file

    if judge is None and (judge_labels is not None or judge_template is not None):
        raise typer.BadParameter("--judge-labels and --judge-template belong to --judge")
    labels = judge_labels.split(",") if judge_labels is not None else None
    model_judge = ModelJudge(judge, labels, template=judge_template, device=device) if judge is not None else None
    options = Options(base, reference, device, dtype.value, batch_size)
    if suite is SuiteName.immunization:
        if any(option is not None for option in (limit, task, system)):
            raise typer.BadParameter("--limit, --task and --system are not for --suite immunization")
        _immunization(models, options, out, model_judge, grid, as_json)
        return
    if grid is not None:
        raise typer.BadParameter("--grid is for --suite immunization")
    asked = load_suite(suite.value)
    if system is not None:
        asked = replace(asked, system=system)
    if task is not None:
        asked = replace(asked, tasks=asked.tasks | {"FA_own": task_from_file(task)})
    if limit is not None:
        asked = asked.limited(limit)
    with continued(out):
        result = run_evaluate(models, asked, out, options, model_judge)
    if as_json:
        emit(result, as_json, "")
        return
    from rich.console import Console

    console = Console()
    console.print(table(result))
    for sentence in result["differences"]:
        console.print(f"• {sentence}")
    console.print(f"written: {out}")


def _immunization(
    models: list[str], options: Any, out: Path, judge: Any, grid_file: Path | None, as_json: bool
) -> None:
    """Attack one model and the undefended one; the plot lies beside `out`."""
    from hftcore.bindings.evaluation.immunization import Grid, read_grid, run_immunization
    from hftcore.bindings.evaluation.immunization_report import draw, table, verdicts
    from hftcore.bindings.evaluation.judge import describe

    if len(models) != 1 or options.reference is None:
        raise typer.BadParameter("--suite immunization takes one MODEL, and the undefended one as --reference")
    grid = Grid() if grid_file is None else read_grid(grid_file)
    with continued(out):
        report, measured = run_immunization(models[0], options.reference, out, options, grid=grid, judge=judge)
    draw(report, grid, out.with_suffix(".png"))
    if as_json:
        emit({"judge": measured, "conditions": [v._asdict() for v in verdicts(report, grid)]}, True, "")
        return
    from rich.console import Console

    console = Console()
    console.print(table(report, grid))
    console.print(describe(measured))
    console.print(f"written: {out}, {out.with_suffix('.png')}")
