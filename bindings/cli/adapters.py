"""`hftcore antidote BASE --adapters ...`: the options, and what is said of the whole list."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hftcore.bindings.cli.reporting import emit

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="MODEL is a base model: repair these adapters of it, each into OUT/NAME, with OUT/report.jsonl. Folders, "
        "folders of folders, or patterns; repeatable."
    ),
]
# what a shell makes of `--adapters runs/*` beyond the first folder
More = Annotated[list[str] | None, typer.Argument(hidden=True, metavar="ADAPTER")]
Workers = Annotated[
    int, typer.Option(min=1, help="With --adapters: processes, each with the base model in its memory.")
]
OnRay = Annotated[bool, typer.Option("--ray", help="With --adapters: the workers are actors of a Ray cluster.")]
Resume = Annotated[bool, typer.Option("--resume", help="With --adapters: keep what OUT holds by the same recipe.")]


def repair_adapters(
    job: Any, dense_ratio: float, adapters: Sequence[str], workers: int, on_ray: bool, resume: bool, as_json: bool
) -> None:
    """Repair them all, say how it went, and leave with 1 if one failed."""
    from hftcore.bindings.adapters.run import run_adapters

    try:
        result = run_adapters(job, dense_ratio, adapters, workers, on_ray, resume)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; finished adapters are whole in {job.out}, --resume goes on from there", err=True)
        raise typer.Exit(130) from None
    notes = [f"kept {result['kept']}"] * bool(result["kept"])
    notes += [f"{len(result['warned'])} with warnings in report.jsonl"] * bool(result["warned"])
    done = "; ".join([f"Repaired {result['repaired']} of {result['adapters']} adapters", *notes])
    text = f"{done}; wrote {result['out']} in {result['seconds']:.1f} s"
    emit(result, as_json, text)
    if failed := result["failed"]:
        names = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        typer.echo(
            f"error: {len(failed)} of {result['adapters']} adapters failed ({names}); see report.jsonl there", err=True
        )
        raise typer.Exit(1)
