"""The command line `hftcore`. A command imports the library when it runs, so that `--help` answers at once."""

import atexit
import gc
import os
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


def program() -> None:
    """`main` as a process of its own, which ends without freeing every object one by one: that takes Python a second."""
    codes: list[int] = []
    # what is registered first is called last, when threads and the handlers registered since are done; those that were there before the
    # program began are passed over
    atexit.register(_leave, codes)
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int):
            codes.append(end.code)
        raise


def _leave(codes: list[int]) -> None:
    """End with this exit code; without one, by a signal or an exception, Python ends as it always does."""
    if not codes:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python flushes again, and says what is wrong; to have closed one is nothing wrong
    os._exit(codes[0])
