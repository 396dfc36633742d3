"""Who repairs the adapters: this process, or processes beside it (`ray_crew.py`: actors of a Ray cluster)."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from hftcore.bindings.adapters.recipes import Line, failed
from hftcore.bindings.adapters.workshop import Task, Work, Workshop
from hftcore.errors import HftcoreError

PATIENCE = 30.0  # seconds a worker has to clean up
LOST = "a worker died while it loaded the base model (out of memory?); use fewer --workers"


def alone(work: Work, tasks: Iterable[Task]) -> Iterator[Line]:
    """Repair the adapters one after the other in this process; yields each one's line of the report.

    Raises:
        HftcoreError: the base model or the data cannot be read.
    """
    workshop = Workshop(work)
    for task in tasks:
        yield workshop.repair(task)


def processes(work: Work, tasks: Iterable[Task], workers: int) -> Iterator[Line]:
    """Repair the adapters in so many processes, each with the base model in its memory; yields lines as they come.

    A worker that dies fails the adapter it had, and another one takes its place. One that dies while it loads the base model is
    warned of, and those that are left go on. When the caller stops, workers are interrupted as by Ctrl-C.

    Raises:
        HftcoreError: the base model or the data cannot be read, or the last worker dies while it loads the base model.
    """
    left = deque(tasks)
    crew: list[_Worker] = []
    dismissed: list[_Worker] = []
    try:
        for _ in range(min(workers, len(left))):
            crew.append(_Worker(work))
        # who still loads the base model is not waited for once the list is empty
        while left or any(worker.task for worker in crew):
            ready = wait([worker.connection for worker in crew])
            for worker in [worker for worker in crew if worker.connection in ready]:
                line = worker.hear()
                if worker.lives and left:
                    worker.give(left.popleft())
                else:
                    crew.remove(worker)
                    worker.connection.close()
                    dismissed.append(worker)
                    if left and worker.is_open:
                        crew.append(_Worker(work))
                    elif left and not crew:
                        raise HftcoreError(LOST)
                    elif left:
                        warnings.warn(LOST, stacklevel=2)
                if line is not None:
                    yield line
    finally:
        for worker in crew:
            worker.interrupt()
        for worker in [*crew, *dismissed]:
            worker.leave()


class _Worker:
    """A process with a workshop, and the adapter it has been given."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        # a child is born with this: Ctrl-C waits until the child knows what to do about it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.lives, self.is_open = True, False
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(BrokenPipeError):  # it died, and `hear` says so
            self.connection.send(task)

    def hear(self) -> Line | None:
        """The line on its adapter; None when it has loaded the base model, or died while it did."""
        task, self.task = self.task, None
        try:
            said: Any = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.lives = False
            died = f"its worker died with exit code {self.process.exitcode} (out of memory?)"
            return None if task is None else failed(task.name, died)
        if isinstance(said, HftcoreError):
            raise said
        self.is_open = True
        return said

    def interrupt(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)

    def leave(self) -> None:
        self.connection.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, work: Work) -> None:
    """What a worker process does: say None when the workshop is open, then a line for each task, until nobody listens."""
    sys.unraisablehook = _tell_all_but_interrupts
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            workshop = Workshop(work)
        except (ValueError, OSError, RuntimeError) as error:
            connection.send(HftcoreError(failed("", error)["error"]))
            return
        connection.send(None)
        while True:
            connection.send(workshop.repair(connection.recv()))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return


def _interrupt_once(*_: Any) -> None:
    # the terminal and the parent both may send it, and what it started must not be interrupted
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _tell_all_but_interrupts(unraisable: Any) -> None:
    # in a destructor an interrupt cannot be raised and is lost; the worker ends when it finds that nobody listens
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
