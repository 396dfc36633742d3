"""Kill a run that prunes on files at random moments, again and again, and look whether the next one loses or repeats anything.

hftcore-bench kills
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from hftcore.bench.models import model_of
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.bindings.checkpoints.verify import verify_folder
from hftcore.bindings.models_io import quiet
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import find_layers

PATTERNS = ("50%", "0.3 model highest")


def campaign(pattern: str, kills: int) -> dict[str, int]:
    """Kill so many runs of a tiny model in several files; between them the power fails: what no line of the journal vouches for is emptied.

    More are killed as long as none has left anything to continue.
    Needs `os.fork`. In memory where that is possible, as waiting for a disk would take most of the time.

    Returns:
        {"killed", "resumed": runs that found finished files, "completed": results, each byte for byte that of a run left alone}.

    Raises:
        HftcoreError: a result that differs, a folder that is there and not whole, or a finished file that was written again.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        return _Victim(Path(place), pattern).suffer(kills)


class _Victim:
    """A checkpoint to prune, and what its pruning leaves in which state."""

    def __init__(self, root: Path, pattern: str) -> None:
        self.root, self.pattern = root, pattern
        self.out, self.work, self.journal = root / "out", root / ".out.partial", root / ".out.journal"
        quiet()
        model = model_of("tiny-llama", torch.bfloat16, torch.device("cpu"))
        model.save_pretrained(root / "model", max_shard_size=sum(p.nbytes for p in model.parameters()) // 4)
        draw = torch.Generator().manual_seed(0)
        self.energy = Energy(
            {layer.name: torch.rand(layer.weight.shape[-1], generator=draw) + 1 for layer in find_layers(model)}, 1, 1
        )
        load_skeleton(root / "model", list_tensors(root / "model"))  # imports what the children would import each

    def suffer(self, kills: int) -> dict[str, int]:
        lengths = []
        for _ in range(3):
            shutil.rmtree(self.out, ignore_errors=True)
            start = _spent()
            self._run(0)
            lengths.append(_spent() - start)
        length, expected = min(lengths), _contents(self.out)
        shutil.rmtree(self.out)
        draw = random.Random(self.pattern)
        killed = resumed = completed = 0
        moments: list[float] = []
        # without a run to continue nothing was tried
        while killed < kills or (not resumed and killed < 10 * kills):
            done = self._finished()
            # one in each tenth before any again: some must come when files are finished already
            moments = moments or draw.sample([(tenth + draw.random()) / 10 for tenth in range(10)], 10)
            killed += self._run((0.02 + 1.08 * moments.pop()) * length)
            resumed += bool(done)
            if self.out.exists() and verify_folder(self.out)["problems"]:
                raise HftcoreError(f"after kill {killed} the folder is there and not whole")
            where = self.out if self.out.exists() else self.work
            for name, changed in done.items():
                if (where / name).stat().st_mtime_ns != changed:
                    raise HftcoreError(f"after kill {killed} {name} was finished and was written again")
            self._fail_power()
            if self.out.exists():
                if _contents(self.out) != expected:
                    raise HftcoreError(f"after kill {killed} the result differs from that of a run left alone")
                completed += 1
                shutil.rmtree(self.out)
                self.journal.unlink(missing_ok=True)
        return {"killed": killed, "resumed": resumed, "completed": completed}

    def _run(self, delay: float) -> bool:
        """Prune in a child that is killed after so many seconds of processor time (0: not at all); whether it was."""
        child = os.fork()
        if not child:
            try:
                if delay:
                    # what the signal does by itself is to end the process at once, as SIGKILL does; its own time, as on a busy
                    # machine no kill would fall into the part that matters
                    signal.setitimer(signal.ITIMER_PROF, delay)
                prune_folder(self.root / "model", self.energy, self.pattern, self.out)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGPROF):
            raise HftcoreError(f"a run that was not killed ended with status {status}")
        return status != 0

    def _finished(self) -> dict[str, int]:
        """The files that the journal vouches for, with the time of their last change."""
        lines = self.journal.read_text().splitlines()[1:] if self.journal.exists() else []
        names = [json.loads(line)[0].removeprefix("file ") for line in lines if line.endswith("]")]
        return {name: (self.work / name).stat().st_mtime_ns for name in names if (self.work / name).is_file()}

    def _fail_power(self) -> None:
        safe = self._finished()
        for file in self.work.rglob("*"):
            name = file.relative_to(self.work).as_posix()
            if file.is_file() and not name.startswith("edit/") and name not in safe:
                file.write_bytes(b"")


def _spent() -> float:
    """Processor seconds of all children so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(campaign(sys.argv[1], int(sys.argv[2]))))
