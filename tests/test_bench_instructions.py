"""Instruction counts: one line each in a result file, the last one counts, a table in the report or the reason why there is none."""

import pytest
import torch
from typer.testing import CliRunner

from hftcore.bench import instructions, measure, results
from hftcore.bench.__main__ import app
from hftcore.bench.plots import draw
from hftcore.bench.report import report
from hftcore.kernels import native

FACTS = {
    "machine": {"cpu": "Some CPU", "cores": 2, "simd": "avx2"},
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
}


@pytest.fixture
def counted(monkeypatch):
    """A machine with valgrind, whose counts can be set."""
    counts = {"column_energy": {"float32": 0.53, "bfloat16": 0.672}, "lower_gram": {"float32": 31.0}}
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    monkeypatch.setattr(instructions, "count", lambda: counts)
    return counts


def section(text):
    return text.split("## Instructions\n\n")[1]


def test_counts_become_a_table_of_the_report_and_the_last_ones_stand(tmp_path, counted):
    file = tmp_path / "r.jsonl"
    results.append(file, instructions.measured(), FACTS)
    counted["column_energy"]["float32"] = 0.51
    results.append(file, instructions.measured(), FACTS)
    lines = results.load(file)
    assert [(one["shape"], one["dtype"], one["instructions"]) for one in lines] == [
        ("column_energy", "float32", 0.51),
        ("column_energy", "bfloat16", 0.672),
        ("lower_gram", "float32", 31.0),
    ]
    text = section(report(lines, "r.jsonl"))
    assert "| op | float32 | bfloat16 |" in text
    assert "| column_energy | 0.51 | 0.67 |" in text
    assert "| lower_gram | 31.00 | – |" in text
    assert "callgrind" in text


def test_without_valgrind_the_report_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    file = tmp_path / "r.jsonl"
    results.append(file, instructions.measured(), FACTS)
    text = section(report(results.load(file), "r.jsonl"))
    assert text == "Not counted in this file: valgrind is not installed (apt-get install valgrind).\n"


def test_a_file_without_counts_says_how_to_get_them(tmp_path):
    file = tmp_path / "r.jsonl"
    nothing = measure.missing(
        {"case": "antidote", "shape": "smollm2", "size": [], "dtype": "float32", "device": "cpu"}
        | {"backend": "native", "threads": 2, "bytes_moved": None, "products": None}
        | {"canary": 1.0, "neighbours": None, "noisy": False},
        "a peer",
        "its reason",
    )
    results.append(file, [nothing], FACTS)
    text = section(report(results.load(file), "r.jsonl"))
    assert text == "Not counted in this file: `hftcore-bench instructions --out FILE` adds them.\n"


def test_counts_are_added_to_a_file_with_times_and_draw_no_picture(tmp_path, monkeypatch, counted):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "machine", lambda device: FACTS["machine"])
    file = tmp_path / "r.jsonl"
    done = CliRunner().invoke(app, ["instructions", "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "| column_energy | 0.53 | 0.67 |" in done.output
    assert draw(results.load(file), tmp_path / "plots") == []
    results.append(file, [], FACTS | {"machine": {"cpu": "Another CPU"}})
    monkeypatch.setattr(results, "machine", lambda device: {"cpu": "Another CPU"})
    before = file.read_bytes()
    refused = CliRunner().invoke(app, ["instructions", "--out", str(file)])
    assert refused.exit_code == 1
    assert "holds results of another machine" in refused.output
    assert file.read_bytes() == before


@pytest.mark.parametrize(("options", "counts"), [([], 3), (["--quick"], 0), (["--case", "prune_rows"], 0)])
def test_a_run_of_everything_ends_with_the_counts(tmp_path, monkeypatch, counted, options, counts):
    monkeypatch.setattr(measure, "run", lambda *_: True)
    file = tmp_path / "r.jsonl"
    done = CliRunner().invoke(app, ["run", *options, "--out", str(file)])
    assert done.exit_code == 0, done.output
    lines = results.load(file) if file.exists() else []
    assert [line["kind"] for line in lines].count("counted") == counts


@pytest.mark.skipif(not native.available(), reason="there is no native library")
@pytest.mark.parametrize("dtype", instructions.DTYPES, ids=str)
def test_every_call_takes_as_many_passes_of_the_library_as_it_says(monkeypatch, dtype):
    passes = []
    kept = native._call
    monkeypatch.setattr(native, "_call", lambda op, job: (passes.append(op), kept(op, job)))
    for op, one in instructions.calls(dtype).items():
        passes.clear()
        one.call()
        assert len(passes) == one.passes, op


@pytest.mark.skipif(not native.available(), reason="there is no native library")
def test_every_op_of_the_library_is_counted(monkeypatch):
    called = set()
    kept = native._call
    monkeypatch.setattr(native, "_call", lambda op, job: (called.add(op), kept(op, job)))
    for one in instructions.calls(torch.float32).values():
        one.call()
    assert called == set(native.OPS)
