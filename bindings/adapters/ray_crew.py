"""The same job list on a Ray cluster, which the optional package ray brings (`pip install "hftcore[ray]"`)."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from hftcore.bindings.adapters.crews import LOST
from hftcore.bindings.adapters.recipes import Line, failed
from hftcore.bindings.adapters.workshop import Task, Work, Workshop
from hftcore.errors import HftcoreError


class Actor:
    """A workshop on some node."""

    def open(self, work: Work) -> str | None:
        """Load the base model; returns what is wrong with it or the data, or None."""
        try:
            self.workshop = Workshop(work)
        except (ValueError, OSError, RuntimeError) as error:
            return failed("", error)["error"]
        return None

    def repair(self, task: Task) -> Line:
        return self.workshop.repair(task)


def actors(work: Work, tasks: Iterable[Task], workers: int) -> Iterator[Line]:
    """Repair the adapters in so many actors of the cluster; yields lines as they come.

    An actor that dies fails the adapter it had, and another one takes its place. One that dies while it loads the base model is
    warned of, and those that are left go on. When the caller stops, what the actors are working on is finished first.

    Raises:
        HftcoreError: ray is missing, no cluster is there, the base model or the data cannot be read on a node, or the last actor dies
            while it loads the base model.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError as error:
        raise HftcoreError("--ray needs the package ray; pip install 'hftcore[ray]', or use --workers alone") from error

    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(logging_level="ERROR")
        except (ConnectionError, RuntimeError) as error:
            raise HftcoreError(
                f"--ray found no cluster: {' '.join(str(error).split())}; look at RAY_ADDRESS"
            ) from error
    needs = {"num_cpus": 1, "num_gpus": int((work.job.device or "").startswith("cuda"))}
    kind = ray.remote(**needs)(Actor)
    left = iter(tasks)
    task = next(left, None)
    running: dict[Any, tuple[Any, Task | None]] = {}

    def start() -> None:
        actor = kind.remote()
        running[actor.open.remote(work)] = actor, None

    try:
        for _ in range(workers):
            start()
        # an actor that the cluster has no room for is not waited for once the list is empty
        while task is not None or any(had for _, had in running.values()):
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, had = running.pop(done)
            try:
                said = ray.get(done)
            except RayActorError as error:
                if had is None:
                    if not running:
                        raise HftcoreError(LOST) from error
                    warnings.warn(LOST, stacklevel=2)
                    continue
                said = failed(had.name, "its Ray worker died (out of memory?)")
                if task is not None:
                    start()
            else:
                if had is None and said is not None:
                    raise HftcoreError(said)
                if task is not None:
                    running[actor.repair.remote(task)] = actor, task
                    task = next(left, None)
            if had is not None:
                yield said
    finally:
        busy = [reference for reference, (_, had) in running.items() if had]
        ray.wait(busy, num_returns=len(busy)) if busy else None
        if not joined:
            ray.shutdown()
