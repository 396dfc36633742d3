"""What a command says: its result, its warnings, and its failure in one line."""

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import typer


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one line on stderr and an exit code: 1 for failure, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("interrupted", err=True)
                raise typer.Exit(130) from None
            except Exception as error:
                # typer's own errors know how to show themselves
                if isinstance(error, typer.Exit) or hasattr(error, "format_message"):
                    raise
                message = " ".join(str(error).split())
                if isinstance(error, MemoryError):
                    message = "out of memory; free some, or work on fewer or shorter samples at a time"
                known = isinstance(error, (ValueError, OSError, MemoryError)) and message
                typer.echo(f"error: {message if known else f'{type(error).__name__}: {message}'}", err=True)
                raise typer.Exit(1) from error

    return run


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result) if as_json else text)
