"""Two commits side by side: each checked out and built in a folder of its own, measured in turns by the cases of this checkout."""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hftcore.bench import tree
from hftcore.bench.measure import Effort
from hftcore.bench.report import table
from hftcore.bench.timing import median_interval, paired
from hftcore.bench.worker import Remote, Worker, WorkerError
from hftcore.errors import HftcoreError

Say = Callable[[str], None]
STEADY_MS = 20  # of calls behind each time, so that the switch between processes does not count


@dataclass(frozen=True)
class Row:
    """One case in both commits.

    Fields:
        ratio: median over rounds of HEAD's time over BASE's; low, high: where it lies with 95 % confidence.
        problem: why there are no numbers.
    """

    name: str
    base_ms: float = 0.0
    head_ms: float = 0.0
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    problem: str = ""

    def verdict(self, threshold: float) -> str:
        """In a word; nothing is said that the noise exceeds, nor that nothing changed.

        >>> Row("", ratio=1.3, low=1.2, high=1.4).verdict(0.1), Row("", ratio=1.0, low=0.7, high=1.7).verdict(0.1)
        ('slower', 'lost in noise')
        """
        if self.problem:
            return self.problem
        if abs(self.ratio - 1) > threshold and not self.low <= 1 <= self.high:
            return "slower" if self.ratio > 1 else "faster"
        return "lost in noise" if max(1 - self.low, self.high - 1) > 2 * threshold else "same"


def compare(base: str, head: str, wanted: list[tuple[str, str, torch.dtype]], effort: Effort, say: Say) -> list[Row]:
    """Measure both commits, in turns within every round.

    Args:
        base, head: what git calls commits.
        wanted: as `measure.chosen` gives. Cases, peers and clocks are those of this checkout; only the measured code is the commits'.
        say: takes one line for people.

    Raises:
        HftcoreError: this is no git checkout, or no such commit; it cannot be built.
    """
    root = _root()
    commits = [_commit(root, ref) for ref in (base, head)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch, _checkouts(root, commits, Path(scratch), say) as paths:
        workers: list[Worker] = []
        try:
            for path in paths:
                command: list[str | Path] = [sys.executable, "-P", "-m", "hftcore.bench.case_process"]
                workers.append(Worker(command, {"PYTHONPATH": str(path)}))
            for name, shape, dtype in wanted:
                rows.append(_row(workers, name, shape, dtype, effort))
                say(f"{rows[-1].name}: {rows[-1].problem or f'{rows[-1].ratio:.3f}'}")
        finally:
            for worker in workers:
                worker.close()
    return rows


def _row(workers: list[Worker], name: str, shape: str, dtype: torch.dtype, effort: Effort) -> Row:
    short = str(dtype).removeprefix("torch.")
    title = f"{name} {shape} {short}"
    try:
        pair = [Remote(partial(_itself, worker), title, case=name, shape=shape, dtype=short) for worker in workers]
        for call in pair:
            call.time(STEADY_MS)
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(effort.rounds):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                times[side].append(pair[side].time(STEADY_MS))
            if sum(times[0]) + sum(times[1]) > 2000 * effort.budget_s:
                break
        for call in pair:
            call.close()
    except WorkerError as error:
        return Row(title, problem=f"not measured: {error}")
    ratios = paired(times[1], times[0])
    low, high = median_interval(ratios)
    return Row(title, statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios), low, high)


def _itself(worker: Worker) -> Worker:
    return worker


def as_table(rows: list[Row], base: str, head: str, threshold: float) -> str:
    """Markdown: times, ratio with its interval, and a word."""
    header = ["case", f"{base} ms", f"{head} ms", "ratio", "95 % interval", ""]
    return table(
        header,
        [
            [row.name, "–", "–", "–", "–", row.problem]
            if row.problem
            else [
                row.name,
                f"{row.base_ms:.4g}",
                f"{row.head_ms:.4g}",
                f"{row.ratio:.3f}",
                f"{row.low:.3f}-{row.high:.3f}",
                row.verdict(threshold),
            ]
            for row in rows
        ],
    )


@contextmanager
def _checkouts(root: Path, commits: list[str], scratch: Path, say: Say) -> Iterator[list[Path]]:
    """Folders to import each commit from, with the native library built; the work trees are gone at the end, whatever happens."""
    made: list[Path] = []
    paths = []
    try:
        for number, commit in enumerate(commits):
            checkout = scratch / f"checkout{number}"
            made.append(checkout)
            _git(root, "worktree", "add", "--detach", str(checkout), commit)
            say(f"building {commit[:9]}")
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            done = subprocess.run(build, cwd=checkout, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise HftcoreError(f"commit {commit[:9]} cannot be built: {said}")
            target = scratch / f"path{number}"
            target.mkdir()
            # the measuring stick is this checkout's for both
            paths.append(tree.link(target, tree.of(checkout) | {"hftcore.bench": tree.here()["hftcore.bench"]}))
        yield paths
    finally:
        for checkout in made:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(checkout)], cwd=root, capture_output=True, check=False
            )
        subprocess.run(["git", "worktree", "prune"], cwd=root, capture_output=True, check=False)


def _root() -> Path:
    folder = tree.here()["hftcore.bench"]
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel"))
    except HftcoreError:
        raise HftcoreError(
            "hftcore-bench compare needs hftcore installed from a git checkout (pip install -e)"
        ) from None


def _commit(root: Path, ref: str) -> str:
    try:
        return _git(root, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    except HftcoreError:
        raise HftcoreError(f"git knows no commit {ref!r}; try a branch, a tag or HEAD~1") from None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HftcoreError(f"git {arguments[0]} failed: {getattr(error, 'stderr', error)}") from None
    return done.stdout.strip()
