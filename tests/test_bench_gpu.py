"""The GPU session without a GPU: its order and its clock, tuning in the interpreter, and the notes a graph is made of."""

import time

import pytest
import torch

pytest.importorskip("triton")

import hftcore
from hftcore.bench import gpu, graphs, measure, results, tuning
from hftcore.bench.cases import CASES
from hftcore.bench.models import LARGE
from hftcore.kernels import launch

CPU = torch.device("cpu")
LITTLE = measure.Effort(is_rehearsal=True)


def test_the_most_important_comes_first_in_bfloat16():
    first, rest = gpu.ordered(rehearse=False)
    assert [one[:2] for one in first] == list(gpu.FIRST)
    assert {one[2] for one in first} == {torch.bfloat16}
    assert not set(first) & set(rest)
    dtypes = [one[2] for one in rest]
    assert dtypes == sorted(dtypes, key=lambda dtype: dtype == torch.float32)


def test_models_that_are_too_small_for_a_gpu_are_left_out():
    first, rest = gpu.ordered(rehearse=False)
    whole = [one for one in first + rest if one[0].startswith(("calibrate", "antidote", "wanda"))]
    assert {one[1] for one in whole} == set(LARGE)
    assert all(one[1] != CASES[one[0]].shapes[0] for one in first + rest if not one[0].startswith("dispatch"))


def test_a_rehearsal_is_of_the_first_shape_of_every_case():
    first, rest = gpu.ordered(rehearse=True)
    assert first == []
    assert set(gpu.REPEATED) < set(CASES)
    expected = {(name, case.shapes[0]) for name, case in CASES.items() if name not in gpu.REPEATED}
    assert {one[:2] for one in rest} == expected


def test_nothing_is_started_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_tests", lambda rehearse, say: True)
    said = []
    file, went_well = gpu.session(tmp_path / "r.jsonl", True, True, said.append, minutes=0)
    assert not went_well
    assert not file.exists()
    assert sum("left out, the time is up" in line for line in said) > len(CASES) - len(gpu.REPEATED)


def test_the_scoreboard_takes_what_time_is_left_and_says_why_it_does_not(tmp_path, monkeypatch):
    said, asked = [], []
    monkeypatch.setattr(gpu, "run_until", lambda deadline, folder: asked.append(folder) or 3)
    monkeypatch.setattr(gpu.embedded, "is_available", lambda: True)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    assert gpu._scoreboard(tmp_path, time.monotonic() + 9, said.append)
    assert gpu._scoreboard(tmp_path, time.monotonic() - 9, said.append)
    monkeypatch.setattr(gpu.embedded, "is_available", lambda: False)
    assert gpu._scoreboard(tmp_path, time.monotonic() + 9, said.append)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    assert gpu._scoreboard(tmp_path, time.monotonic() + 9, said.append)
    reasons = ["the time is up", "the embedded model is not here", "peft is not installed"]
    left_out = [f"scoreboard: left out, {reason}" for reason in reasons]
    assert said == ["scoreboard: 3 cells", "scoreboard: done", *left_out]
    assert asked == [tmp_path]


def test_what_was_measured_before_a_kill_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_tests", lambda rehearse, say: True)
    wanted = [("column_energy", "tiny", torch.float32), ("prune_mask", "tiny", torch.float32)]
    monkeypatch.setattr(gpu, "chosen", lambda: wanted)
    usual = measure.measure

    def killed(name, *others):
        if name == "prune_mask":
            raise KeyboardInterrupt
        return usual(name, *others)

    monkeypatch.setattr(measure, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.session(tmp_path / "r.jsonl", True, False, lambda line: None)
    (ours,) = [line for line in results.load(tmp_path / "r.jsonl") if line["kind"] == "ours"]
    assert (ours["case"], ours["backend"]) == ("column_energy", "triton")


def test_a_curve_that_fails_does_not_cost_the_session_the_rest(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_tests", lambda rehearse, say: True)
    monkeypatch.setattr(gpu, "chosen", lambda: [("column_energy", "tiny", torch.float32)])
    monkeypatch.setattr(gpu, "sweep", broken)
    monkeypatch.setattr(gpu.tuning, "propose", broken)
    said = []
    file, went_well = gpu.session(tmp_path / "r.jsonl", True, True, said.append)
    assert not went_well
    assert "tune: failed, RuntimeError: out of memory" in said
    assert "prune_rows by columns: failed, RuntimeError: out of memory" in said
    assert {line["case"] for line in results.load(file)} == {"column_energy"}


def test_tuning_asks_about_every_choice_of_the_launch_table(monkeypatch):
    with hftcore.use_backend("triton"):
        lines = list(tuning.propose(CPU, LITTLE, time.monotonic() + 60))
    assert len(lines) == len(tuning.QUESTIONS)
    for line, question in zip(lines, tuning.QUESTIONS, strict=True):
        assert line.startswith(f"tune {question.function} {question.tiny}: ")
        assert "keep" in line or "take" in line
        assert "that give the same result" in line


def test_a_faster_tile_is_proposed_and_a_wrong_one_never(monkeypatch):
    fast, wrong = launch.Tile(1, 64, 2), launch.Tile(2, 64, 2)

    def call(weight, energy):
        tile = launch.group_tile(64)
        return weight + (1 if tile == wrong else 0)

    def timed(variants, *_):
        return {name: [1.0 if name == str(fast) else 2.0] for name in variants}

    question = tuning.Question("group_tile", "4x64", "4x64", call, lambda now: iter([fast, wrong]))
    monkeypatch.setattr(tuning, "interleave", timed)
    answer = tuning._answer(question, "4x64", CPU, measure.Effort())
    assert answer.startswith(f"take {fast}, 1 ms instead of 2 ms of Tile(")
    assert answer.endswith("of 2 that give the same result")
    monkeypatch.setattr(tuning, "interleave", lambda variants, *_: {name: [1.0] for name in variants})
    assert tuning._answer(question, "4x64", CPU, measure.Effort()).startswith("keep Tile(")


def test_a_forced_tile_is_gone_after_the_block():
    usual = launch.group_tile
    with tuning.forced("group_tile", (1, 2, 3)):
        assert launch.group_tile(4096) == (1, 2, 3)
    assert launch.group_tile is usual
    with pytest.raises(ZeroDivisionError), tuning.forced("group_tile", (1, 2, 3)):
        _ = 1 / 0
    assert launch.group_tile is usual


def test_the_kernels_alone_are_launched_again_with_the_same_arguments(monkeypatch):
    from triton.runtime.jit import JITFunction

    ran, replays = [], []

    class Kernel(JITFunction):
        def __init__(self):
            pass

    class Graph:
        def replay(self):
            replays.append(len(ran))

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            ran.append("capture")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **named: ran.append((args, named)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    kernel = Kernel()
    before = JITFunction.run
    alone = graphs.kernels_alone(lambda: kernel[(7,)](1, 2, num_warps=4))
    assert JITFunction.run is before
    launched = ((1, 2), {"grid": (7,), "warmup": False, "num_warps": 4})
    assert ran == [launched, "capture", launched]
    alone()
    assert replays == [3]
    assert graphs.kernels_alone(lambda: None) is None
