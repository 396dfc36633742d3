"""The program's commands, in the order in which help lists them.

A command is a plain function in a module of its own beside this one: typer reads its options from the annotations
(`options.py` holds the shared ones), it imports the library inside, and a line in `COMMANDS` adds it.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from hftcore.bindings.cli.data import data
from hftcore.bindings.cli.demo import demo
from hftcore.bindings.cli.doctor import doctor
from hftcore.bindings.cli.edits import apply, revert
from hftcore.bindings.cli.evaluate import evaluate
from hftcore.bindings.cli.gradnorms import gradnorms
from hftcore.bindings.cli.prune import antidote, calibrate, wanda
from hftcore.bindings.cli.reporting import reported
from hftcore.bindings.cli.train import train
from hftcore.bindings.cli.tune import tune
from hftcore.bindings.cli.verify import verify

COMMANDS = (
    demo,
    calibrate,
    wanda,
    antidote,
    apply,
    revert,
    train,
    evaluate,
    gradnorms,
    tune,
    verify,
    doctor,
)

app = typer.Typer(
    name="hftcore",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(version("hftcore"))
        raise typer.Exit


@app.callback()
def program(
    is_asked: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Defend language models against harmful fine-tuning: prune, train, measure."""


for command in COMMANDS:
    app.command()(reported(command))
app.add_typer(data)
