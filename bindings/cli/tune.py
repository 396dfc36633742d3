"""`hftcore tune`."""

from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings.cli.evaluate import continued
from hftcore.bindings.cli.options import AsJson, Base, Device, DType, LoadDType, Model, OutHere, named_after
from hftcore.bindings.cli.reporting import emit


def tune(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="antidote, panacea, the null hypotheses shrink, magnitude, random, random-norm, noise, or an Edit's folder; several: a,b.",
        ),
    ],
    model: Model,
    until: Annotated[str, typer.Option(help="What the dose must reach on requests set aside for it: HS<=5.")],
    keep: Annotated[str | None, typer.Option(help="What it may cost, as a change in points: FA>=-2.")] = None,
    out: OutHere = None,
    data: Annotated[
        Path | None, typer.Option(help="Harmful texts, .jsonl. [default: AdvBench requests with affirmative stubs]")
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="The fine-tuned task, .jsonl with prompt and completion, in place of FA's own.")
    ] = None,
    highest: Annotated[float | None, typer.Option(help="Largest dose tried. [default: the method's]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Equal steps up to it before bisection.")] = 5,
    tolerance: Annotated[
        float, typer.Option(help="Width of the last interval, as a share of the largest dose.")
    ] = 0.05,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each part.")] = None,
    system: Annotated[str | None, typer.Option(help="System message. [default: the chat template's]")] = None,
    base: Base = None,
    device: Device = None,
    dtype: LoadDType = DType.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Find the smallest dose of a defence that repairs a model.

    By bisection over reversible edits; says so when no dose does it. Results, plot and Edits lie in OUT; a run there is continued."""
    from dataclasses import replace

    from hftcore.bindings.evaluation.run import Options
    from hftcore.bindings.evaluation.suites import load_suite
    from hftcore.bindings.evaluation.tasks import task_from_file
    from hftcore.bindings.tuning.dose import parse_goal
    from hftcore.bindings.tuning.tune import Plan, lines, run_tune

    kept = parse_goal(keep, is_change=True) if keep is not None else None
    plan = Plan(parse_goal(until), kept, highest, steps, tolerance, data)
    asked = load_suite("validation")
    if system is not None:
        asked = replace(asked, system=system)
    if task is not None:
        asked = replace(asked, tasks=asked.tasks | {"FA": task_from_file(task)})
    if limit is not None:
        asked = asked.limited(limit)
    options = Options(base=base, device=device, dtype=dtype.value, batch_size=batch_size)
    out = out or named_after(method, model)
    with continued(out):
        result = run_tune(method.split(","), model, plan, asked, out, options)
    emit(result, as_json, "\n".join([*lines(result), f"written: {out}"]))
