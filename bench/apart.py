"""A case in a process of its own: memory that the C library kept from an earlier one would be taken for this one's, or hide it."""

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from hftcore.bench.measure import Effort, measure
from hftcore.bench.results import Measurement

PATIENCE_S = 10  # for an interrupted case to clean up


def measure_apart(name: str, shape: str, dtype: torch.dtype, device: torch.device, effort: Effort) -> list[Measurement]:
    """As `measure`, which see; the process comes from one that has imported everything and computed nothing.

    Raises:
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hftcore.bench.apart", "transformers"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, name, shape, dtype, device, effort))
    process.start()
    theirs.close()
    found: Any = None
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process died with exit code {process.exitcode} (out of memory?)") from None
    finally:
        if found is None and process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE_S)
        process.kill()
        process.join()
        ours.close()
    if isinstance(found, Exception):
        raise found
    return found


def _tell(connection: Connection, *case: Any) -> None:
    try:
        connection.send(measure(*case))
    except Exception as error:  # the asker decides
        connection.send(error)
    except KeyboardInterrupt:
        return
