"""The command line `hftcore-bench`. torch and the cases are imported when a command runs."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hftcore-bench",
    help="Measure hftcore against its peers and against what the machine allows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

OutFile = Annotated[Path | None, typer.Option(help="JSON Lines file; measurements are added to it.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small shapes and few rounds.")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="Only this case; repeat for more.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", help="Only this shape; repeat for more.")]


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _refuse(error: Exception) -> typer.Exit:
    _say(f"error: {' '.join(str(error).split())}")
    return typer.Exit(1)


@contextmanager
def _refusals() -> Iterator[None]:
    """What is wrong with the request becomes one line."""
    from hftcore.errors import HftcoreError

    try:
        yield
    except (HftcoreError, ValueError, OSError) as error:
        raise _refuse(error) from error


@app.command("list")
def list_cases() -> None:
    """Show the cases and their shapes, and the scaling curves."""
    from hftcore.bench.cases import CASES
    from hftcore.bench.scaling import SWEEPS

    for name, case in CASES.items():
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
        typer.echo(f"{name}: {case.about}\n    {', '.join(case.shapes)}; {dtypes}")
    for name, sweep in SWEEPS.items():
        typer.echo(f"{name}: {sweep.about} against {sweep.axis}\n    {', '.join(f'{one:g}' for one in sweep.values)}")


@app.command("run")
def run_cases(quick: Quick = False, case: Cases = None, shape: Shapes = None, out: OutFile = None) -> None:
    """Measure the cases on the CPU, and print the report. `--quick` takes under five minutes on two cores, all under an hour.

    A run of everything ends with the instruction counts.
    """
    import multiprocessing
    import tempfile
    import time

    import torch

    from hftcore.bench import instructions, results
    from hftcore.bench.apart import measure_apart
    from hftcore.bench.measure import Effort, chosen, duration, run
    from hftcore.bench.report import report
    from hftcore.bench.timing import Neighbours

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, _refusals():
        file = out or Path(folder) / "this run"
        wanted = chosen(case, shape, quick)
        facts = results.run_facts(device)
        results.require_same_machine(file, facts)
        effort = Effort(rounds=3, budget_s=0.5) if quick else Effort()
        begin, neighbours = time.monotonic(), Neighbours()
        try:
            # where a system cannot fork, in this process
            how = measure_apart if "forkserver" in multiprocessing.get_all_start_methods() else None
            complete = run(
                wanted, device, effort, lambda measured: results.append(file, measured, facts), _say, None, how
            )
            if not (quick or case or shape):
                _say("counting instructions")
                results.append(file, instructions.measured(), facts)
            if complete and not (case or shape):
                name = results.QUICKLY if quick else results.WHOLLY
                results.append(file, [duration(name, time.monotonic() - begin, device, neighbours)], facts)
        finally:  # of an interrupted run too
            if file.exists():
                typer.echo(report(results.load(file), file.name))
    if not complete:
        raise typer.Exit(1)


@app.command()
def scale(
    quick: Quick = False,
    curve: Annotated[
        list[str] | None, typer.Option(help="Only this curve, as `list` names them; repeat for more.")
    ] = None,
    out: OutFile = None,
) -> None:
    """Measure cost against rows, columns, tokens, samples, layers, sparsity and threads on the CPU, and print exponents; a few minutes.

    The curves against several processes are those of `hftcore-bench ranks`.
    """
    import tempfile

    import torch

    from hftcore.bench import results
    from hftcore.bench.measure import Effort, sweep
    from hftcore.bench.report import report
    from hftcore.bench.scaling import SWEEPS
    from hftcore.errors import HftcoreError

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, _refusals():
        file = out or Path(folder) / "this run"
        for name in curve or ():
            if name not in SWEEPS:
                raise HftcoreError(f"--curve must be one of {', '.join(SWEEPS)}, got {name!r}")
        facts = results.run_facts(device)
        results.require_same_machine(file, facts)
        effort = Effort(rounds=3, budget_s=2.0) if quick else Effort(budget_s=20.0)
        try:
            for name in curve or SWEEPS:
                results.append(file, sweep(name, torch.float32, device, effort), facts)
                _say(f"{name}: done")
        finally:  # of an interrupted run too
            if file.exists():
                typer.echo(report(results.load(file), file.name))


@app.command("report")
def report_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What run, scale or gpu wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the Markdown here, and its pictures into the folder `plots` beside it.")
    ] = None,
) -> None:
    """Print a result file as Markdown tables, with the targets met and not met; with --out write it, with pictures."""
    from hftcore.bench.plots import draw
    from hftcore.bench.report import report
    from hftcore.bench.results import load

    with _refusals():
        lines = load(file)
        if out is None:
            typer.echo(report(lines, file.name), nl=False)
            return
        text = report(lines, file.name)
        made = draw(lines, out.parent / "plots")
        text = report(lines, file.name, [(title, path.relative_to(out.parent).as_posix()) for title, path in made])
        out.write_text(text, encoding="utf-8")
        typer.echo(str(out))


@app.command()
def static(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeat for more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the Markdown here instead of printing it.")] = None,
) -> None:
    """Compile every Triton kernel at every launch configuration, without a GPU: registers, spills, loads, occupancy, roofline."""
    from hftcore.bench.static import TARGETS, compiled, document
    from hftcore.errors import HftcoreError

    with _refusals():
        for name in target or ():
            if name not in TARGETS:
                raise HftcoreError(f"--target must be one of {', '.join(TARGETS)}, got {name!r}")
        records = []
        for name in target or TARGETS:
            _say(f"compiling for {name}")
            records += compiled([name])
        text = document(records)
        if out is None:
            typer.echo(text, nl=False)
        else:
            out.write_text(text, encoding="utf-8")


@app.command("compare")
def compare_refs(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A commit, branch or tag.")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="Another.")] = "HEAD",
    threshold: Annotated[float, typer.Option(help="In percent: what slows down by more fails.")] = 10.0,
    quick: Quick = False,
    case: Cases = None,
    shape: Shapes = None,
) -> None:
    """Measure two commits in turns on the CPU, each in a checkout of its own; exit 1 where HEAD is slower past the threshold."""
    from hftcore.bench.measure import Effort, chosen
    from hftcore.bench.refs import as_table, compare

    with _refusals():
        wanted = chosen(case, shape, quick or not (case or shape))
        effort = Effort(rounds=7, budget_s=2.0) if quick else Effort(rounds=15, budget_s=10.0)
        rows = compare(base, head, wanted, effort, _say)
        typer.echo(as_table(rows, base, head, threshold / 100))
    if all(row.problem for row in rows) or any(row.verdict(threshold / 100) == "slower" for row in rows):
        raise typer.Exit(1)


@app.command()
def peers(
    install: Annotated[bool, typer.Option("--install", help="Make their environments, anew where they exist.")] = False,
    name: Annotated[list[str] | None, typer.Option(help="Only this package; repeat for more.")] = None,
) -> None:
    """Show the packages that are compared with, each in an environment of its own; --install makes these."""
    from hftcore.bench import packages

    with _refusals():
        for one in name or [*packages.PACKAGES, *packages.LEFT_OUT]:
            if install and (name or one in packages.PACKAGES):
                packages.install(one, _say)
            typer.echo(f"{one}: {packages.why_not(one) or 'ready'}")


@app.command()
def ranks(
    quick: Quick = False,
    count: Annotated[
        list[int] | None, typer.Option(min=1, help="So many processes; repeat for more. [default: 1, 2, 4]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file; what was found is added to it.")] = None,
) -> None:
    """Measure what several processes gain in calibration and what exact selection pays for being shared; some eight minutes."""
    import torch

    from hftcore.bench import ranks as several
    from hftcore.bench import results
    from hftcore.bench.scaling import SIZES

    found = []
    with _refusals():
        facts = results.run_facts(torch.device("cpu"))
        if out is not None:
            results.require_same_machine(out, facts)
        for number in count or several.RANKS:
            found.append(several.measure(number, SIZES[:1] if quick else SIZES, 1 if quick else 5, calibrates=True))
            _say(f"{number}: done")
            if out is not None:
                results.append(out, several.lines(found[-1]), facts)
        typer.echo(several.tables(found))


@app.command()
def kills(
    count: Annotated[int, typer.Option(min=1, help="Kills for each of the two patterns.")] = 100,
) -> None:
    """Kill pruning on files at random moments, and check that the next run loses and repeats nothing; some two minutes."""
    import torch

    from hftcore.bench.kills import PATTERNS, campaign

    torch.set_num_threads(1)
    with _refusals():
        for pattern in PATTERNS:
            found = campaign(pattern, count)
            typer.echo(f"{pattern}: " + ", ".join(f"{number} {what}" for what, number in found.items()))


@app.command("instructions")
def count_instructions(out: OutFile = None) -> None:
    """Count the instructions of the native kernels under callgrind, which no neighbour disturbs; takes two minutes or three."""
    import tempfile

    import torch

    from hftcore.bench import instructions, results
    from hftcore.bench.report import report

    with tempfile.TemporaryDirectory() as folder, _refusals():
        file = out or Path(folder) / "this run"
        facts = results.run_facts(torch.device("cpu"))
        results.require_same_machine(file, facts)
        results.append(file, instructions.measured(), facts)
        typer.echo(report(results.load(file), file.name))


@app.command()
def gpu(
    out: OutFile = None,
    tune: Annotated[bool, typer.Option("--tune", help="Try other launch numbers too, and propose a table.")] = False,
    minutes: Annotated[float, typer.Option(help="Nothing is started after so many, less half a minute.")] = 8.5,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same on CPU tensors of tiny shapes, in Triton's interpreter.")
    ] = False,
) -> None:
    """Do all that is worth doing on a GPU machine in under nine minutes: its tests, then every case, then scaling."""
    if rehearse:
        # read by triton when it is imported, so before anything else
        os.environ["TRITON_INTERPRET"] = "1"
    from hftcore.bench.gpu import session

    with _refusals():
        file, went_well = session(out, rehearse, tune, _say, minutes)
    typer.echo(str(file))
    if not went_well:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; usage errors are one line on stderr and exit code 2."""
    # so that a polite kill cleans up as Ctrl-C does: no work tree is left behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        _say("interrupted; what was measured is kept")
        sys.exit(130)
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
