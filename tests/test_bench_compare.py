"""Calls in other processes, and two commits side by side: answers come back, times are theirs, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from hftcore.bench import measure, refs, timing, tree
from hftcore.bench.__main__ import app, main
from hftcore.bench.job import Job
from hftcore.bench.refs import Row
from hftcore.bench.worker import REST_S, Remote, Worker, WorkerError
from hftcore.errors import HftcoreError

SERVICE = """
import sys, time, torch
from hftcore.bench.job import Job
from hftcore.bench.worker import serve

def prepare(request):
    if request["job"] == "broken":
        raise ValueError("no such way")
    print("a library's chatter")
    if request["job"] == "dying":
        def call(): sys.exit("out of luck")
    else:
        def call():
            time.sleep(0.01)
            return torch.full((2,), request["value"])
    return Job(call, {}, lambda: None, torch.equal)

serve(prepare)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts workers, and ends them."""
    made = []

    def start_one():
        folder = tmp_path_factory.mktemp("worker")
        (folder / "path").mkdir()
        (folder / "service.py").write_text(SERVICE)
        path = tree.link(folder / "path", tree.here())
        made.append(Worker([sys.executable, "-P", folder / "service.py"], {"PYTHONPATH": str(path)}))
        return made[-1]

    yield start_one
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def worker(start):
    return start()


def test_a_worker_answers_and_times_its_own_calls(worker):
    first, second = (Remote(lambda: worker, name, value=value) for name, value in (("first", 1.5), ("second", 2.5)))
    assert first().tolist() == [1.5, 1.5]
    assert second().tolist() == [2.5, 2.5]
    assert 9 < first.time() < 500
    assert second.extra_bytes() is not None
    first.close()
    with pytest.raises(WorkerError, match="KeyError"):
        worker.ask("time", job="first", steady_ms=0)


def test_threads_that_spin_after_their_work_rest_before_another_process_is_timed(monkeypatch):
    happened = []

    class Recorder:
        def ask(self, do, **details):
            happened.append(do)
            return {"ms": 1.0}

    monkeypatch.setattr("hftcore.bench.worker.time.sleep", happened.append)
    assert Remote(Recorder, "any").time() == 1.0
    assert happened == ["prepare", REST_S, "time", REST_S]


def test_what_this_process_started_is_no_neighbour():
    """While it runs and after it ended: a peer of another process must not make its own times noisy."""
    if timing.Neighbours().cores() is None:
        pytest.skip("the system does not tell")
    code = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"
    before = timing.Neighbours._own()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        running = timing.Neighbours._own()
        child.communicate(b"\n")
    assert running - before >= 0.35
    assert timing.Neighbours._own() >= running - 0.05


def test_what_a_worker_cannot_do_is_told_and_the_next_request_served(start):
    worker = start()
    with pytest.raises(WorkerError, match="ValueError: no such way"):
        Remote(lambda: worker, "broken")()
    assert Remote(lambda: worker, "good", value=1.0)().tolist() == [1.0, 1.0]
    with pytest.raises(WorkerError, match="the process ended: out of luck"):
        Remote(lambda: worker, "dying")()
    worker.close()
    worker.close()


def test_a_package_that_fails_or_answers_otherwise_is_left_out_with_the_reason(worker):
    ours = torch.full((2,), 1.5)
    job = Job(
        ours=lambda: ours,
        peers={
            "same": Remote(lambda: worker, "same", value=1.5),
            "other": Remote(lambda: worker, "other", value=3.0),
            "broken": Remote(lambda: worker, "broken"),
        },
        restore=lambda: None,
        agrees=torch.equal,
    )
    assert set(measure.compare(job, torch.device("cpu"))) == {measure.OURS, "same", "other"}
    assert list(job.peers) == ["same"]
    assert job.missing == {
        "other": "another answer: 100 % of the values, by up to 1.5",
        "broken": "ValueError: no such way",
    }


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two commits that looks like this one; its setup.py builds nothing."""
    root = tmp_path / "repository"

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)

    for folder in ("hftcore", "kernels", "bindings", "bench"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("commit = 1\n")
    (root / "setup.py").write_text("import pathlib\npathlib.Path('built').touch()\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (root / "hftcore" / "__init__.py").write_text("commit = 2\n")
    git("commit", "-q", "-a", "-m", "two")
    monkeypatch.setattr(refs, "_root", lambda: root)
    return root, git


def test_both_commits_are_checked_out_built_and_gone_at_the_end(checkout, tmp_path):
    root, git = checkout
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    commits = [refs._commit(root, ref) for ref in ("HEAD~1", "HEAD")]
    with refs._checkouts(root, commits, scratch, lambda line: None) as paths:
        sources = [(path / "hftcore" / "__init__.py").read_text() for path in paths]
        assert all((scratch / f"checkout{number}" / "built").exists() for number in (0, 1))
        assert len(git("worktree", "list").stdout.splitlines()) == 3
        # the cases are this checkout's for both
        assert {(path / "hftcore" / "bench").resolve() for path in paths} == {tree.here()["hftcore.bench"]}
    assert sources == ["commit = 1\n", "commit = 2\n"]
    assert len(git("worktree", "list").stdout.splitlines()) == 1
    assert not (scratch / "checkout0").exists()


def test_an_interrupt_leaves_no_work_tree(checkout, tmp_path):
    root, git = checkout
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def interrupted(line):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        refs._checkouts(root, [refs._commit(root, "HEAD")], scratch, interrupted),
    ):
        pass
    assert len(git("worktree", "list").stdout.splitlines()) == 1
    assert not (scratch / "checkout0").exists()


def test_a_terminated_command_cleans_up_and_ends_with_143(monkeypatch):
    def terminated(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    cleaned = []
    monkeypatch.setattr(refs, "compare", terminated)
    monkeypatch.setattr("sys.argv", ["hftcore-bench", "compare", "HEAD~1"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert cleaned


def test_a_commit_that_cannot_be_built_is_named(checkout, tmp_path):
    root, git = checkout
    (root / "setup.py").write_text("raise SystemExit('no compiler')\n")
    git("commit", "-q", "-a", "-m", "three")
    with pytest.raises(HftcoreError, match=r"commit .* cannot be built: no compiler"):
        refs.compare("HEAD", "HEAD", [], measure.Effort(), lambda line: None)
    assert len(git("worktree", "list").stdout.splitlines()) == 1


@pytest.mark.parametrize("ref", ["nothing", "--help"])
def test_an_unknown_commit_is_one_line(checkout, ref):
    done = CliRunner().invoke(app, ["compare", "--", ref])
    assert done.exit_code == 1
    assert done.output.startswith(f"error: git knows no commit {ref!r}")
    assert done.output.count("\n") == 1


def test_a_change_counts_only_past_the_threshold_and_past_the_noise():
    assert Row("", ratio=1.05, low=1.04, high=1.06).verdict(0.1) == "same"
    assert Row("", ratio=1.3, low=1.2, high=1.4).verdict(0.1) == "slower"
    assert Row("", ratio=1.3, low=0.9, high=1.7).verdict(0.1) == "lost in noise"
    assert Row("", ratio=1.0, low=0.7, high=1.4).verdict(0.1) == "lost in noise"
    assert Row("", ratio=1.0, low=0.9, high=1.15).verdict(0.1) == "same"
    assert Row("", ratio=0.7, low=0.6, high=0.8).verdict(0.1) == "faster"
    assert Row("", problem="not measured: gone").verdict(0.1) == "not measured: gone"


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([Row("a", ratio=1.3, low=1.2, high=1.4)], 1),
        ([Row("a", ratio=1.3, low=1.2, high=1.4), Row("b", problem="not measured")], 1),
        ([Row("a", ratio=1.0, low=0.9, high=1.1), Row("b", problem="not measured")], 0),
        ([Row("b", problem="not measured")], 1),
    ],
)
def test_compare_fails_on_a_slowdown_and_when_nothing_was_measured(monkeypatch, rows, code):
    monkeypatch.setattr(refs, "compare", lambda *_: rows)
    done = CliRunner().invoke(app, ["compare", "HEAD~1", "--threshold", "10"])
    assert done.exit_code == code
    assert "| a |" in done.output or rows[0].problem in done.output


def test_a_slower_commit_is_seen(tmp_path, monkeypatch):
    """Both sides are this code, but one of them sleeps."""
    paths = []
    for name in ("base", "head"):
        folders = tree.here()
        if name == "head":
            folders["hftcore"] = tmp_path / "slow"
            folders["hftcore"].mkdir()
            for entry in tree.here()["hftcore"].iterdir():
                if entry.name not in ("ops", "kernels", "bindings", "bench"):
                    (folders["hftcore"] / entry.name).symlink_to(entry)
            ops = folders["hftcore"] / "ops"
            ops.mkdir()
            for entry in (tree.here()["hftcore"] / "ops").glob("*.py"):
                text = entry.read_text()
                if entry.name == "energy.py":
                    text += "\n_quick = column_energy\ndef column_energy(x, mask=None):\n    import time\n"
                    text += "    time.sleep(0.02)\n    return _quick(x, mask)\n"
                (ops / entry.name).write_text(text)
        target = tmp_path / name
        target.mkdir()
        paths.append(tree.link(target, folders))

    class Checkouts:
        def __enter__(self):
            return paths

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(refs, "_root", lambda: tmp_path)
    monkeypatch.setattr(refs, "_commit", lambda root, ref: ref)
    monkeypatch.setattr(refs, "_checkouts", lambda *_: Checkouts())
    wanted = [("column_energy", "tiny", torch.float32)]
    (row,) = refs.compare("a", "b", wanted, measure.Effort(rounds=6, budget_s=5), lambda line: None)
    assert row.verdict(0.1) == "slower"
    assert row.head_ms - row.base_ms > 15
