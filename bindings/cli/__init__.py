"""The command line `hftcore`. A command imports the library when it runs, so that `--help` answers at once."""

import gc
import signal
import sys


def main() -> None:
    """Run the command line; usage errors are one line on stderr and exit code 2."""
    import typer

    from hftcore.bindings.cli.app import app

    # imports make some 400,000 objects that stay: to look through them again and again meanwhile, 900 times, takes half a second
    gc.set_threshold(10_000)
    # so that a polite kill cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        # help, which is what no arguments at all ask for, keeps its lines
        typer.echo(message if message.startswith("Usage:") else f"error: {message} (see hftcore --help)", err=True)
        sys.exit(getattr(error, "exit_code", 2))
