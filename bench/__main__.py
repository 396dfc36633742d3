"""The command line `hftcore-bench`. torch and the cases are imported when a command runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hftcore-bench",
    help="Measure hftcore against its peers and against what the machine's memory allows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

OutFile = Annotated[Path | None, typer.Option(help="JSON Lines file; measurements are added to it.")]


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _refuse(error: Exception) -> typer.Exit:
    _say(f"error: {' '.join(str(error).split())}")
    return typer.Exit(1)


@app.command("list")
def list_cases() -> None:
    """Show the cases and their shapes."""
    from hftcore.bench.cases import CASES

    for name, case in CASES.items():
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
        typer.echo(f"{name}: {case.about}\n    {', '.join(case.shapes)}; {dtypes}")


@app.command("run")
def run_cases(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and few rounds: about a minute.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeat for more.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only this shape; repeat for more.")] = None,
    out: OutFile = None,
) -> None:
    """Measure on the CPU, and print the report."""
    import tempfile

    import torch

    from hftcore.bench import results
    from hftcore.bench.measure import Effort, chosen, run
    from hftcore.bench.report import report
    from hftcore.errors import HftcoreError

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = out or Path(folder) / "this run"
        try:
            wanted = chosen(case, shape, quick)
            facts = results.run_facts(device)
            effort = Effort(rounds=3, budget_s=0.5) if quick else Effort()
            complete = run(wanted, device, effort, lambda measured: results.append(file, measured, facts), _say)
            if file.exists():
                typer.echo(report(results.load(file), file.name))
        except (HftcoreError, ValueError, OSError) as error:
            raise _refuse(error) from error
    if not complete:
        raise typer.Exit(1)


@app.command("report")
def report_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What run or gpu wrote.")],
) -> None:
    """Print a result file as Markdown tables, with the targets met and not met."""
    from hftcore.bench.report import report
    from hftcore.bench.results import load

    try:
        typer.echo(report(load(file), file.name), nl=False)
    except (ValueError, OSError) as error:
        raise _refuse(error) from error


@app.command()
def gpu(
    out: OutFile = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same on CPU tensors of tiny shapes, in Triton's interpreter.")
    ] = False,
) -> None:
    """Do all that is worth doing on a GPU machine in under nine minutes: its tests, then every case."""
    if rehearse:
        # read by triton when it is imported, so before anything else
        os.environ["TRITON_INTERPRET"] = "1"
    from hftcore.bench.gpu import session
    from hftcore.errors import HftcoreError

    try:
        file, went_well = session(out, rehearse, _say)
    except (HftcoreError, OSError) as error:
        raise _refuse(error) from error
    typer.echo(str(file))
    if not went_well:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; usage errors are one line on stderr and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        typer.echo(
            message if message.startswith("Usage:") else f"error: {message} (see hftcore-bench --help)", err=True
        )
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
