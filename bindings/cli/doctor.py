"""`hftcore doctor`."""

from hftcore.bindings.cli.options import AsJson
from hftcore.bindings.cli.reporting import emit


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can run and what is missing."""
    from hftcore.bindings.doctor import examine, render

    report = examine()
    emit(report, as_json, render(report))
