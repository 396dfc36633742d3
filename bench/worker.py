"""Calls in another process, which times them itself: another commit of hftcore, or a package in an environment of its own.

The two talk in JSON lines; the other process does nothing between requests, and before and after it is timed both rest until their
threads sleep, so the two never compete for the cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from hftcore.bench.job import Job
from hftcore.bench.memory import HELD, RETURNED, USUAL, extra_bytes, freed_memory
from hftcore.bench.timing import Clock

PATIENCE_S = 10  # for a process to end by itself once its input is closed
REST_S = 0.02  # PyTorch's threads spin for some 4 ms after their last work, longer where a pause takes more cycles


class WorkerError(Exception):
    """The other process could not do what it was asked, with its reason."""


class Worker:
    """A process that serves requests.

    Args:
        command: starts it.
        environment: variables beside ours.
    """

    def __init__(self, command: list[str | Path], environment: Mapping[str, str]) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._errors = Path(self._scratch.name) / "errors"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | dict(environment),
                cwd=self._scratch.name,
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("the process has no pipes")
        self._pipes = self._process.stdin, self._process.stdout

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """The reply to one request.

        Raises:
            WorkerError: it failed, or the process is gone.
        """
        to, back = self._pipes
        try:
            to.write(json.dumps({"do": do, **details}) + "\n")
            to.flush()
            line = back.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._errors.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise WorkerError(f"the process ended: {said[-1]}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def answer(self, job: str) -> Any:
        """What the call of a prepared job returns."""
        path = Path(self._scratch.name) / "answer.pt"
        self.ask("answer", job=job, file=str(path))
        return torch.load(path, weights_only=True)

    def close(self) -> None:
        """End the process; more than once does no harm."""
        to, back = self._pipes
        if to.closed:
            return
        with suppress(BrokenPipeError):
            to.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            back.close()
            self._scratch.cleanup()


class Remote:
    """A peer of a job that a worker runs; calling it gives its answer. The worker starts, and the job is made, at the first use.

    Args:
        start: gives the worker, always the same.
        job: its name there.
        details: of the request to prepare it.

    Everything raises WorkerError where the other process cannot.
    """

    def __init__(self, start: Callable[[], Worker], job: str, **details: Any) -> None:
        self._start, self._job, self._details = start, job, details
        self._is_prepared = False

    def _worker(self) -> Worker:
        worker = self._start()
        if not self._is_prepared:
            worker.ask("prepare", job=self._job, threads=torch.get_num_threads(), **self._details)
            self._is_prepared = True
        return worker

    def __call__(self) -> Any:
        return self._worker().answer(self._job)

    def time(self, steady_ms: float = 0.0) -> float:
        """Milliseconds of one call, taken by the process that makes it.

        Args:
            steady_ms: call again until so much time was taken, and give the median.
        """
        worker = self._worker()
        time.sleep(REST_S)
        taken = worker.ask("time", job=self._job, steady_ms=steady_ms)["ms"]
        time.sleep(REST_S)
        return taken

    def extra_bytes(self) -> int | None:
        """As `memory.extra_bytes`, of that process."""
        return self._worker().ask("extra", job=self._job)["bytes"]

    def close(self) -> None:
        """Have the job forgotten, for its memory."""
        if self._is_prepared:
            self._start().ask("forget", job=self._job)
            self._is_prepared = False


def serve(prepare: Callable[[dict[str, Any]], Job]) -> None:
    """Answer requests until the input ends: "prepare" makes a job, the others call its `ours`.

    What libraries print goes to the errors, so that the replies stay alone.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    clock = Clock(torch.device("cpu"))
    jobs: dict[str, Job] = {}
    freed = ExitStack()
    freed.enter_context(freed_memory(RETURNED))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                torch.set_num_threads(request["threads"])
                jobs[request["job"]] = job = prepare(request)
                reply: dict[str, Any] = {"rounds": job.rounds}
            elif request["do"] == "forget":
                jobs.pop(request["job"]).close()
                reply = {}
            else:
                if request["do"] == "time":
                    # from the first time on: nothing but timing follows
                    freed.enter_context(freed_memory(HELD if jobs[request["job"]].holds_memory else USUAL))
                reply = _reply(request, jobs[request["job"]], clock)
        except Exception as error:  # of whatever library: the asker decides
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(reply), file=replies, flush=True)


def _reply(request: dict[str, Any], job: Job, clock: Clock) -> dict[str, Any]:
    job.restore()
    if request["do"] == "time":
        times = [clock.time(job.ours, job.inner)]
        while sum(times) * job.inner < request["steady_ms"]:
            job.restore()
            times.append(clock.time(job.ours, job.inner))
        return {"ms": statistics.median(times)}
    if request["do"] == "extra":
        return {"bytes": extra_bytes(job.ours, clock.device)}
    torch.save(job.answer(job.ours()), request["file"])
    return {}
