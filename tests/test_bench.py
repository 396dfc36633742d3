"""The benchmark suite: cases agree with their peers, statistics and verdicts are right, and the GPU command refuses a CPU."""

import doctest
import importlib
import json
import multiprocessing
import os
import pkgutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import hftcore
import hftcore.bench
from hftcore.bench import apart, cases, gpu, instructions, measure, memory, packages, results, selection, timing
from hftcore.bench.__main__ import app
from hftcore.bench.ceiling import IN_PLACE
from hftcore.bench.job import Case, Job, UnavailableError, Work, shape_of
from hftcore.bench.ranks import RANKS
from hftcore.bench.report import report
from hftcore.bench.scaling import RANKED
from hftcore.bench.targets import ELSEWHERE, TARGETS, Target

CPU = torch.device("cpu")
FIRST = [(name, case.shapes[0], dtype) for name, case in cases.CASES.items() for dtype in case.dtypes]
FACTS = {
    "machine": {"cpu": "Some CPU", "cores": 2, "simd": "avx2"},
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
}


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """What is installed on this machine beside must not decide what is tested."""
    monkeypatch.setattr(packages, "why_not", lambda name: "not installed")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(variant, times, kind="peer", case="prune_rows", shape="1gb", dtype="float32", **others):
    spread = timing.summary(times)
    values = {
        "case": case,
        "shape": shape,
        "size": list(shape_of(shape, getattr(torch, dtype))),
        "dtype": dtype,
        "device": "cpu",
        "backend": "native",
        "threads": 2,
        "variant": variant,
        "kind": kind,
        "times_ms": times,
        "median_ms": spread.median,
        "p20_ms": spread.p20,
        "p80_ms": spread.p80,
        "bytes_moved": 10**9,
        "products": 0,
        "extra_bytes": 1_000_000,
        "canary": 1.0,
        "neighbours": 0.0,
        "noisy": False,
    }
    return results.Measurement(**(values | others))


def written(path, *measurements):
    results.append(path, measurements, FACTS)
    return path


@pytest.mark.parametrize(("name", "shape", "dtype"), FIRST)
def test_every_case_agrees_with_its_peers_on_its_first_shape(name, shape, dtype):
    job = cases.CASES[name].prepare(shape, dtype, CPU)
    try:
        assert job.peers or job.ceilings, f"{name} is compared with nothing"
        assert set(measure.compare(job, CPU)) == {measure.OURS, *job.peers}
    finally:
        job.close()


@pytest.mark.parametrize("name", ["prune_rows", "prune_matrix", "prune_2_4"])
def test_restoring_brings_every_weight_back(name):
    job = cases.CASES[name].prepare("tiny", torch.float32, CPU)
    job.restore()
    before = job.ceilings[IN_PLACE]().clone()
    assert not torch.equal(job.ours(), before)
    job.restore()
    assert torch.equal(job.ceilings[IN_PLACE](), before)


def test_every_named_shape_exists_and_1gb_is_one_gibibyte():
    for case in cases.CASES.values():
        for shape in case.shapes:
            for dtype in case.dtypes:
                assert min(shape_of(shape, dtype)) > 0
    for dtype in (torch.float32, torch.bfloat16):
        rows, columns = shape_of("1gb", dtype)
        assert rows * columns * dtype.itemsize == 2**30


def test_an_ideal_row_prune_reads_and_writes_each_weight_once():
    work = cases.CASES["prune_rows"].work((3, 5), 2)
    assert work == Work(2 * 3 * 5 * 2 + 4 * 5, steps=33 * 3 * 5)


def test_a_tie_broken_otherwise_agrees_and_another_weight_does_not():
    weight = torch.tensor([[1.0, 2.0, 2.0, 4.0]])
    agrees = selection.same_up_to_ties(weight, torch.ones(4), lambda matrix: matrix)
    ours = torch.tensor([[0.0, 0.0, 2.0, 4.0]])
    assert agrees(ours, ours)
    assert agrees(ours, torch.tensor([[0.0, 2.0, 0.0, 4.0]]))
    assert agrees(ours, torch.tensor([[0.0, 0.0, 0.0, 4.0]]))
    assert not agrees(ours, torch.tensor([[0.0, 0.0, 2.0, 0.0]]))
    assert not agrees(ours, torch.tensor([[1.0, 0.0, 0.0, 4.0]]))


def test_a_tie_counts_only_inside_its_group():
    weight = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    rows = selection.same_up_to_ties(weight, torch.ones(2), lambda matrix: matrix)
    ours = torch.tensor([[0.0, 2.0], [0.0, 3.0]])
    assert not rows(ours, torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    matrix = selection.same_up_to_ties(weight, torch.ones(2), lambda matrix: matrix.reshape(1, -1))
    assert matrix(ours, torch.tensor([[0.0, 0.0], [2.0, 3.0]]))


def job(ours, peer, check=lambda answer: None):
    return Job(lambda: torch.tensor(ours), {"peer": lambda: torch.tensor(peer)}, lambda: None, torch.equal, check=check)


def refuse(answer):
    raise ValueError("removed 1 of 4")


@pytest.mark.parametrize(
    ("wrong", "message"), [(job([1.0], [2.0]), "peer differs"), (job([1.0], [1.0], refuse), "removed 1 of 4")]
)
def test_nothing_is_timed_when_an_answer_is_wrong(monkeypatch, wrong, message):
    monkeypatch.setitem(cases.CASES, "wrong", Case("", ("tiny",), None, lambda *_: wrong))
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(measure.DisagreementError, match=message):
        measure.measure("wrong", "tiny", torch.float32, CPU, measure.Effort())


def test_another_answer_of_a_compiled_peer_is_shown_and_the_rest_is_measured():
    case = job([1.0], [2.0])
    case.compiled = ("peer",)
    assert set(measure.compare(case, CPU)) == {measure.OURS, "peer"}
    assert case.peers == {}
    assert case.missing["peer"].startswith("another answer")


def test_a_failed_case_does_not_stop_the_next_and_is_told(monkeypatch):
    def missing(*_):
        raise UnavailableError("no model")

    monkeypatch.setitem(cases.CASES, "wrong", Case("", ("tiny",), None, lambda *_: job([1.0], [2.0])))
    monkeypatch.setitem(cases.CASES, "missing", Case("", ("tiny",), None, missing))
    kept, said = [], []
    wanted = [(name, "tiny", torch.float32) for name in ("wrong", "missing", "column_energy")]
    complete = measure.run(wanted, CPU, measure.Effort(is_rehearsal=True), kept.extend, said.append)
    assert not complete
    assert {one.case for one in kept} == {"column_energy"}
    assert "failed" in said[0]
    assert "no model" in said[1]


def test_a_run_starts_nothing_after_its_deadline():
    said = []
    wanted = [("column_energy", "tiny", torch.float32)]
    assert not measure.run(wanted, CPU, measure.Effort(), pytest.fail, said.append, deadline=time.monotonic() - 1)
    assert "the time is up" in said[0]


def test_percentiles_are_linear_between_neighbours():
    assert timing.percentile([10.0], 0.8) == 10.0
    assert timing.percentile([0.0, 10.0], 0.25) == 2.5
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Summary(3.0, 1.8, 4.2)


def test_a_paired_ratio_forgives_a_slow_round():
    assert timing.paired_ratio([2.0, 200.0, 2.0, 2.0], [1.0, 100.0, 1.0, 4.0]) == 2.0
    assert timing.paired_ratio([6.0, 6.0, 60.0], [2.0, 2.0]) == 3.0


def test_rounds_are_interleaved_turned_and_restored():
    ran = []

    class Clock:
        def time(self, call, inner):
            call()
            return 1.0

    variants = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = timing.interleave(variants, Clock(), lambda: ran.append("-"), rounds=3, budget_s=9)
    assert "".join(ran) == "-a-b-c-b-c-a-c-a-b"
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


def test_a_variant_sits_out_when_its_budget_is_used_up():
    class Clock:
        def time(self, call, inner):
            return call()

    times = timing.interleave({"slow": lambda: 600.0, "fast": lambda: 1.0}, Clock(), lambda: None, 5, budget_s=1)
    assert [len(times[name]) for name in ("slow", "fast")] == [2, 5]


def test_the_canary_tells_a_machine_that_slows_down():
    canary = timing.Canary(timing.Clock(CPU))
    canary.times = [2.0, 2.0, 2.2]
    assert canary.slowdown() == 1.0
    canary.times = [2.0, 4.0, 4.0]
    assert canary.slowdown() == 2.0
    assert timing.is_noisy(canary.slowdown(), 0.0)


@pytest.mark.parametrize("sampled", [False, True])
def test_extra_memory_is_what_a_call_takes_for_a_while(monkeypatch, sampled):
    def take():
        block = torch.ones(64 << 18)  # 64 MiB
        time.sleep(0.01)
        return float(block[0])

    if sampled:
        monkeypatch.setattr(memory.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    assert 60 << 20 < memory.extra_bytes(take, CPU) < 80 << 20
    assert memory.extra_bytes(lambda: None, CPU) < 4 << 20
    # what was freed before, and kept for later, is not taken for memory that the call needs none of
    with memory.freed_memory(memory.HELD):
        take()
        assert 60 << 20 < memory.extra_bytes(take, CPU) < 80 << 20


def test_a_result_file_keeps_the_last_run_of_each_case(tmp_path):
    """What an earlier run had beside it makes no ratio with the later one's rounds, with whatever backend that was."""
    file = written(
        tmp_path / "sub" / "r.jsonl",
        measured("hftcore", [3.0], "ours"),
        measured("copy_", [1.0]),
        measured("topk", [9.0]),
        measured("hftcore", [5.0], "ours", shape="tiny"),
    )
    written(file, measured("hftcore", [2.0], "ours", backend="torch"), measured("copy_", [4.0], backend="torch"))
    lines = results.load(file)
    kept = {(line["shape"], line["variant"]): line["median_ms"] for line in lines}
    assert kept == {("1gb", "hftcore"): 2.0, ("1gb", "copy_"): 4.0, ("tiny", "hftcore"): 5.0}
    assert lines[0]["machine"] == FACTS["machine"]


@pytest.mark.parametrize("arguments", [("run", "--quick"), ("scale", "--quick"), ("gpu", "--rehearse")])
def test_nothing_is_measured_into_the_file_of_another_machine(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = written(tmp_path / "r.jsonl", measured("hftcore", [3.0], "ours"))
    before = file.read_bytes()
    done = command(*arguments, "--out", file)
    assert done.exit_code == 1
    assert "r.jsonl holds results of another machine than this; choose another file with --out" in done.output
    assert file.read_bytes() == before


@pytest.mark.parametrize("bad", ["{", "[]", '{"case": "prune_rows"}'])
def test_a_line_that_is_no_measurement_is_named(tmp_path, bad):
    file = written(tmp_path / "r.jsonl", measured("hftcore", [3.0], "ours"))
    file.write_text(file.read_text() + bad + "\n")
    done = command("report", file)
    assert done.exit_code == 1
    assert "line 2 of r.jsonl" in done.output


def test_facts_name_neither_host_nor_path():
    text = json.dumps(results.run_facts(CPU))
    assert str(Path.home()) not in text
    assert str(Path(hftcore.__file__).parent) not in text
    node = Path("/proc/sys/kernel/hostname")
    assert not node.exists() or node.read_text().strip() not in text


VERDICTS = [
    (Target("c", "s", "d", "ratio", 3.0, IN_PLACE), 3.0, True),
    (Target("c", "s", "d", "ratio", 2.9, IN_PLACE), 3.0, False),
    (Target("c", "s", "d", "speedup", 1 / 3, IN_PLACE), 1 / 3, True),
    (Target("c", "s", "d", "speedup", 0.5, IN_PLACE), 1 / 3, False),
    (Target("c", "s", "d", "difference_us", 2000, IN_PLACE), 2000, True),
    (Target("c", "s", "d", "extra_mb", 8), 9.0, False),
    (Target("c", "s", "d", "extra_mb", 9.5), 9.0, True),
    (Target("c", "s", "d", "minutes", 4e-5), 5e-5, False),
    (Target("c", "s", "d", "minutes", 5e-5), 5e-5, True),
]


@pytest.mark.parametrize(("target", "value", "met"), VERDICTS)
def test_a_target_is_measured_and_judged(target, value, met):
    found = {
        "hftcore": {"times_ms": [3.0, 3.0], "extra_bytes": 9_000_000},
        IN_PLACE: {"times_ms": [1.0, 1.0], "extra_bytes": 0},
    }
    (measured, *_) = target.values(found.get)
    assert measured == pytest.approx(value)
    assert target.is_met(measured) is met
    assert target.values({}.get) == []


def test_the_fastest_rounds_need_not_be_the_same():
    found = {"hftcore": {"times_ms": [3.0, 9.0, 9.0]}, IN_PLACE: {"times_ms": [4.0, 3.0, 2.0]}}
    target = Target("c", "s", "d", "ratio", 3.0, IN_PLACE)
    assert target.values(found.get) == [0.75, 3.0, 4.5]
    assert target.fastest(found.get) == 1.5


def test_every_target_is_about_a_case_and_shape_that_exist():
    for target in TARGETS:
        if target.case in RANKED:
            assert int(target.shape) in RANKS
            continue
        if target.case == results.RUN:
            continue
        case = cases.CASES[target.case]
        assert target.shape in case.shapes
        assert target.dtype in [str(dtype).removeprefix("torch.") for dtype in case.dtypes]


def synthetic(path, mine=3.5, **others):
    return written(
        path,
        measured("hftcore", [2 * mine, mine, mine], "ours", **others),
        measured(IN_PLACE, [2.0, 1.0, 1.0], "ceiling", **others),
        measured("hftcore", [1.0, 1.0], "ours", shape="llama-7b.up_proj", **others),
        measured("Wanda-code sort", [160.0, 160.0], shape="llama-7b.up_proj", **others),
    )


def rows_of(text, start):
    return [line for line in text.splitlines() if line.startswith(f"| {start}")]


def test_the_report_gives_ratios_and_verdicts(tmp_path):
    done = command("report", synthetic(tmp_path / "r.jsonl"))
    assert done.exit_code == 0
    in_place, memory_line, sort = rows_of(done.output, "prune_rows 1gb float32")[:2] + rows_of(
        done.output, "prune_rows llama-7b.up_proj float32"
    )
    assert in_place.endswith("| 3.5 | 3.5 | **not met** |")
    assert memory_line.endswith("| 1 | – | met |")
    assert sort.endswith("| 160 | 160 | met |")
    absent = done.output.split("Not measured in this file:\n\n")[1].split("\n\n")[0].splitlines()
    assert "- antidote smollm2 float32: at most 1.1 x the time of one plain pass" in absent
    assert "- prune_rows 1gb bfloat16: at most 1.33 x the time of in place mul_(1) (on a GPU)" in absent
    assert "- calibrate by ranks 2 float32: at least 1.7 x faster than one process" in absent
    assert "- 200 kills of a run on files: nothing lost, nothing repeated: `hftcore-bench kills`" in absent
    assert len(absent) == len(TARGETS) + len(ELSEWHERE) - 3
    big = rows_of(done.output, "1gb [16384, 16384]")[0].split(" | ")
    assert big[2] == "3.5"
    assert big[4] == "286"  # 1 GB in 3.5 ms
    assert big[5] == "13.3 %"  # 1 GB of work in 3.5 ms, where 2 GiB of traffic take 1 ms
    assert big[6] == "3.5"


def test_the_report_marks_noise_and_leaves_other_thread_counts_unjudged(tmp_path):
    noisy = report(results.load(synthetic(tmp_path / "a.jsonl", mine=2.0, noisy=True)), "a.jsonl")
    assert rows_of(noisy, "prune_rows 1gb float32")[0].endswith("| 2 | 2 | met, noisy |")
    other = report(results.load(synthetic(tmp_path / "b.jsonl", threads=8)), "b.jsonl")
    assert "not judged: it is for 2 threads, this run had 8" in rows_of(other, "prune_rows 1gb float32")[0]


def test_an_empty_result_file_is_refused(tmp_path):
    (tmp_path / "r.jsonl").touch()
    done = command("report", tmp_path / "r.jsonl")
    assert done.exit_code == 1
    assert "holds no measurements" in done.output


def test_list_names_every_case():
    done = command("list")
    assert done.exit_code == 0
    assert all(f"{name}: {case.about}" in done.output for name, case in cases.CASES.items())


def test_run_writes_measurements_and_prints_their_report(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "chosen", lambda *_: [("column_energy", "tiny", torch.float32)])
    file = tmp_path / "r.jsonl"
    done = command("run", "--quick", "--out", file)
    assert done.exit_code == 0, done.output
    lines = [line for line in results.load(file) if line["case"] != results.RUN]
    assert {line["kind"] for line in lines} == {"ours", "peer", "ceiling"}
    assert all(len(line["times_ms"]) == 3 for line in lines)
    assert rows_of(done.output, "tiny [64, 96]")


def test_a_case_apart_is_measured_told_about_and_survived(monkeypatch):
    (ours, *_) = apart.measure_apart("column_energy", "tiny", torch.float32, CPU, measure.Effort(is_rehearsal=True))
    assert (ours.case, ours.variant, len(ours.times_ms)) == ("column_energy", "hftcore", 1)
    with pytest.raises(KeyError, match="no such case"):
        apart.measure_apart("no such case", "tiny", torch.float32, CPU, measure.Effort())
    with pytest.raises(RuntimeError, match="process died with exit code"):
        # a device that cannot even be sent over: the process ends before it begins
        apart.measure_apart("column_energy", "tiny", torch.float32, _Deadly(), measure.Effort())
    assert not multiprocessing.active_children()


class _Deadly:
    def __reduce__(self):
        return os._exit, (3,)


def test_what_may_not_sit_out_is_timed_in_every_round():
    # as calls of another process do, these say themselves that they took 20 ms
    calls = dict.fromkeys(("ours", "peer"), SimpleNamespace(time=lambda: 20.0))
    times = timing.interleave(calls, timing.Clock(CPU), lambda: None, 4, 0.03, always=["ours"])
    assert [len(times["ours"]), len(times["peer"])] == [4, 2]


def test_the_duration_of_a_complete_run_of_all_cases_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *_: True)
    monkeypatch.setattr(instructions, "measured", list)
    file = tmp_path / "r.jsonl"
    assert command("run", "--quick", "--out", file).exit_code == 0
    shown = command("run", "--out", file)
    assert [line["shape"] for line in results.load(file)] == ["--quick", "everything"]
    (quick,) = rows_of(shown.output, "hftcore-bench run --quick: at most 5 minutes")
    (all_of_it,) = rows_of(shown.output, "hftcore-bench run everything: at most 60 minutes")
    for row in (quick, all_of_it):
        assert " | met, one round" in row or "not judged" in row


def test_a_run_of_some_cases_or_one_that_failed_has_no_duration(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *_: False)
    assert command("run", "--quick", "--out", tmp_path / "r.jsonl").exit_code == 1
    monkeypatch.setattr(measure, "run", lambda *_: True)
    assert command("run", "--quick", "--case", "prune_rows", "--out", tmp_path / "r.jsonl").exit_code == 0
    assert not (tmp_path / "r.jsonl").exists()


def test_an_interrupted_run_shows_and_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(_wanted, _device, _effort, keep, *_):
        keep([measured("hftcore", [3.0], "ours")])
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "machine", lambda device: FACTS["machine"])
    monkeypatch.setattr(measure, "run", interrupted)
    shown = command("run", "--quick")
    assert shown.exit_code == 130
    assert rows_of(shown.output, "1gb [16384, 16384]")
    kept = tmp_path / "r.jsonl"
    command("run", "--quick", "--out", kept)
    assert len(results.load(kept)) == 1


def test_a_shape_that_no_chosen_case_has_is_refused_with_those_that_exist():
    done = command("run", "--case", "dispatch_prune", "--shape", "1gb")
    assert done.exit_code == 1
    assert "no chosen case has a chosen shape; dispatch_prune: dispatch" in done.output
    small = command("run", "--quick", "--shape", "1gb")
    assert small.exit_code == 1
    assert "--quick runs only tiny, " in small.output


@pytest.mark.parametrize(
    ("option", "message"),
    [("--case", "--case must be one of prune_rows,"), ("--shape", "--shape must be one of tiny,")],
)
def test_run_refuses_a_case_or_shape_it_does_not_know(option, message):
    done = command("run", option, "prune_row")
    assert done.exit_code == 1
    assert message in done.output


def test_what_is_run_can_be_chosen():
    float32 = torch.float32
    assert measure.chosen(["prune_rows"], ["1gb"]) == [
        ("prune_rows", "1gb", float32),
        ("prune_rows", "1gb", torch.bfloat16),
    ]
    assert {shape for _, shape, _ in measure.chosen(["antidote", "prune_mask"], quick=True)} == {
        "tiny",
        "llama-7b.q_proj",
        "tiny-llama",
    }
    assert len(measure.chosen()) == sum(len(case.shapes) * len(case.dtypes) for case in cases.CASES.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_refuses_a_machine_without_one_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("gpu")
    assert done.exit_code == 1
    assert done.output.startswith("error: hftcore-bench gpu needs a CUDA or ROCm device")
    assert done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_takes_the_way_of_the_gpu_session(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_tests", lambda rehearse, say: True)
    monkeypatch.setattr(gpu, "chosen", lambda: [("column_energy", shape, torch.float32) for shape in ("tiny", "1gb")])
    monkeypatch.setattr(gpu, "use_backend", lambda name: hftcore.use_backend("torch"))
    file, went_well = gpu.session(tmp_path / "r.jsonl", True, False, lambda line: None)
    assert went_well
    assert {line["shape"] for line in results.load(file)} == {"tiny", "64", "128", "256"}


@pytest.mark.parametrize("name", [found.name for found in pkgutil.iter_modules(hftcore.bench.__path__)])
def test_docstring_examples(name):
    module = importlib.import_module(f"hftcore.bench.{name}")
    assert doctest.testmod(module, extraglobs=vars(module)).failed == 0
