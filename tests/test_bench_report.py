"""What a report says of measurements: verdicts within noise, shares of ceilings, curves and their bends, pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hftcore.bench import measure, packages, plots, ranks, results, scaling, short, timing, whole
from hftcore.bench.__main__ import app
from hftcore.bench.cases import CASES, in_order
from hftcore.bench.ceiling import IN_PLACE, MATMUL, OP, READ, SIDE, share
from hftcore.bench.job import Job, shape_of
from hftcore.bench.models import model_of
from hftcore.bench.report import report
from hftcore.bench.scaling import SWEEPS, Bend, Sweep, bend, exponent
from hftcore.bench.steps import PLAIN_STEP
from hftcore.bench.streaming import COPY
from hftcore.bench.targets import Target
from hftcore.bench.whole import PLAIN

CPU = torch.device("cpu")
FACTS = {
    "machine": {"cpu": "Some CPU", "cores": 2, "simd": "avx2"},
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
}
COMMON = {
    "shape": "llama-7b.q_proj",
    "size": [4096, 4096],
    "dtype": "float32",
    "device": "cpu",
    "backend": "native",
    "threads": 2,
    "bytes_moved": 2 * 4096 * 4096 * 4,
    "products": 0,
    "canary": 1.0,
    "neighbours": 0.0,
    "noisy": False,
}


def line(case, variant, kind, times, extra=1_000_000, **others):
    common = COMMON | {"case": case} | others
    if kind == "missing":
        return measure.missing(common, variant, "its reason")
    return measure.timed(common, variant, kind, times, extra)


def written(path, *measurements, facts=FACTS):
    results.append(path, measurements, facts)
    return path


def loaded(tmp_path, *measurements):
    return results.load(written(tmp_path / "r.jsonl", *measurements))


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40))
def test_the_median_lies_in_its_interval_between_two_of_the_values(values):
    low, high = timing.median_interval(values)
    assert low in values
    assert high in values
    assert low <= timing.summary(values).median <= high


def test_the_interval_of_the_median_is_that_of_the_sign_test():
    # tables of the sign test at 5 %, two-sided: 0 of 6, 1 of 9, 3 of 15 are the last that reject
    for n, place in ((5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (20, 5)):
        values = [float(i) for i in range(n)]
        assert timing.median_interval(values) == (values[place], values[n - 1 - place])


def test_a_verdict_that_the_noise_could_turn_is_not_given(tmp_path):
    lines = loaded(
        tmp_path,
        line("prune_rows", "hftcore", "ours", [2.0, 4.0, 2.5, 3.5, 2.9, 3.1], shape="1gb"),
        line("prune_rows", IN_PLACE, "ceiling", [1.0] * 6, shape="1gb"),
    )
    (row,) = [one for one in report(lines, "r").splitlines() if "prune_rows 1gb float32: at most 3 x" in one]
    assert row.endswith("| 3 [2, 4] | 2 | undecided |")


def test_a_speedup_that_may_be_none_is_marked(tmp_path):
    lines = loaded(
        tmp_path,
        line("column_energy", "hftcore", "ours", [1.0] * 6, shape="tiny"),
        line("column_energy", "square().sum()", "peer", [0.8, 1.2, 0.9, 1.1, 1.1, 1.3], shape="tiny"),
        line("column_energy", "Wanda-code norm", "peer", [2.0] * 6, shape="tiny"),
    )
    (row,) = [one for one in report(lines, "r").splitlines() if one.startswith("| tiny")]
    assert "| ~1.1 (1.0 MB) | 2 (1.0 MB) |" in row


def test_the_rates_of_the_ceilings_are_those_of_the_largest_buffer(tmp_path):
    lines = loaded(
        tmp_path,
        line("prune_rows", "hftcore", "ours", [9.0], shape="tiny", size=[64, 96]),
        line("prune_rows", IN_PLACE, "ceiling", [1.0], shape="tiny", size=[64, 96]),
        line("prune_rows", "hftcore", "ours", [9.0], shape="1gb", size=[16384, 16384]),
        line("prune_rows", IN_PLACE, "ceiling", [20.0], shape="1gb", size=[16384, 16384]),
        line("prune_matrix", "hftcore", "ours", [9.0], shape="1gb", size=[16384, 16384]),
        line("prune_matrix", IN_PLACE, "ceiling", [40.0], shape="1gb", size=[16384, 16384]),
        line("grad_norms_sq", "hftcore", "ours", [9.0], shape="samples-7b T128", size=[4, 128, 4096, 4096]),
        line("grad_norms_sq", READ, "ceiling", [9.0], shape="samples-7b T128", size=[4, 128, 4096, 4096]),
        line("grad_norms_sq", MATMUL, "ceiling", [10.0], shape="samples-7b T128", size=[4, 128, 4096, 4096]),
        line("dispatch_prune", "hftcore", "ours", [0.02], shape="dispatch", size=[4, 64]),
        line("dispatch_prune", OP, "ceiling", [0.003], shape="dispatch", size=[4, 64]),
    )
    text = report(lines, "r").split("## Ceilings")[1]
    assert f"| {IN_PLACE} | 53.7-107 GB/s of 1024 MiB | – |" in text
    assert f"| {MATMUL} | 215 GFLOP/s | – |" in text
    assert f"| {OP} | 3 us | – |" in text
    assert f"| {READ} |" not in text.split("## prune_rows")[0]


def test_one_round_is_called_one_round(tmp_path):
    lines = loaded(
        tmp_path,
        line("antidote", "hftcore", "ours", [0.8], shape="smollm2"),
        line("antidote", PLAIN, "ceiling", [1.0], shape="smollm2"),
    )
    (row,) = [one for one in report(lines, "r").splitlines() if one.startswith("| antidote smollm2")]
    assert row.endswith("| 0.8 | 0.8 | met, one round |")


def test_the_few_numbers_for_the_front_page_are_generated_with_their_weaknesses(tmp_path):
    lines = loaded(
        tmp_path,
        line("prune_rows", "hftcore", "ours", [2.0] * 3, shape="1gb", extra=600_000, noisy=True),
        line("prune_rows", IN_PLACE, "ceiling", [1.0, 1.0, 0.8], shape="1gb", noisy=True),
        line("antidote", "hftcore", "ours", [0.8], shape="smollm2"),
        line("antidote", PLAIN, "ceiling", [1.0], shape="smollm2"),
    )
    assert report(lines, "r").split("## In short\n\n")[1].split("\n\n")[0].splitlines() == [
        "|  | float32 | bfloat16 |",
        "|---|---|---|",
        "| 50 % of every row, 1 GB, time of an in-place `w.mul_(1)` | 2 × [2, 2.5] (noisy) |  |",
        "| extra memory, rows, 1 GB | 0.6 MB |  |",
        "| `antidote` on SmolLM2, 64 × 128 tokens, time of one plain forward pass | 0.8 × (one round) |  |",
    ]


def test_the_front_page_shows_cases_and_comparisons_that_exist():
    for words, case, shape, _, _ in short.ROWS:
        assert shape in CASES[case].shapes, words
    job = CASES["prune_rows"].prepare("tiny", torch.float32, CPU)
    for _, case, _, _, against in short.ROWS:
        if case == "prune_rows" and against:
            assert against in {**job.peers, **job.ceilings}


def test_the_front_page_shows_the_numbers_of_the_committed_report():
    root = Path(__file__).resolve().parent.parent
    rows = (
        (root / "bench" / "REPORT.md").read_text().partition("## In short\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    )
    shown = {row.split(" | ")[0]: row for row in (root / "README.md").read_text().splitlines() if row.startswith("| ")}
    for row in rows:
        assert shown.get(row.split(" | ")[0], row) == row, "copy the table `In short` of bench/REPORT.md into README.md"


def test_every_ceiling_has_a_column(tmp_path):
    lines = loaded(
        tmp_path,
        line("streaming prune, row scope", "hftcore", "ours", [3.0] * 6, shape="llama-1b"),
        line("streaming prune, row scope", COPY, "ceiling", [2.0] * 6, shape="llama-1b"),
        line("streaming prune, row scope", measure.ALONE, "kernels", [1.0] * 6, shape="llama-1b"),
    )
    header, _, row = (one for one in report(lines, "r").split("## streaming")[1].splitlines() if one.startswith("|"))
    assert f"| x {COPY} | x {measure.ALONE} |" in header
    assert "| 1.5 | 3 |" in row


def test_a_file_added_to_later_is_in_the_order_of_the_cases(tmp_path):
    lines = loaded(
        tmp_path,
        line("column_energy", "hftcore", "ours", [1.0], shape="tiny"),
        line("prune_rows", "hftcore", "ours", [1.0], shape="1gb"),
        line("prune_rows", "hftcore", "ours", [1.0], shape="tiny", dtype="bfloat16"),
        line("prune_rows", "hftcore", "ours", [1.0], shape="tiny"),
    )
    order = [(one["case"], one["shape"], one["dtype"]) for one in in_order(lines)]
    assert order == [
        ("prune_rows", "tiny", "float32"),
        ("prune_rows", "tiny", "bfloat16"),
        ("prune_rows", "1gb", "float32"),
        ("column_energy", "tiny", "float32"),
    ]


def test_a_peer_that_could_not_run_is_listed_with_its_reason(tmp_path):
    lines = loaded(
        tmp_path,
        line("step grad norms", "hftcore", "ours", [1.0], shape="small-llama T128"),
        line("step grad norms", "Opacus hooks", "missing", [], shape="small-llama T128"),
    )
    text = report(lines, "r")
    assert "- Opacus hooks (small-llama T128 float32): its reason" in text
    assert "faster than Opacus hooks" in text


def test_the_share_counts_the_work_at_the_measured_rates():
    ours = {
        "size": [8, 4],
        "dtype": "float32",
        "device": "cpu",
        "bytes_moved": 3 * 128,
        "products": 0,
        "median_ms": 6.0,
    }
    # the in-place pass moves 256 bytes in 2 ms, so 384 bytes take 3 ms
    assert share(ours, {IN_PLACE: {"median_ms": 2.0}, READ: {"median_ms": 0.5}}.get) == 0.5
    assert share(ours, {READ: {"median_ms": 0.5}}.get) == 3 * 0.5 / 6.0
    assert share(ours, {}.get) is None
    product = {MATMUL: {"median_ms": 10.0}}
    assert share(ours | {"bytes_moved": None, "products": SIDE["cpu"] ** 3}, product.get) == 5.0 / 6.0
    # whichever takes longer
    both = product | {READ: {"median_ms": 10.0}}
    assert share(ours | {"products": 2 * SIDE["cpu"] ** 3, "bytes_moved": 128}, both.get) == 10.0 / 6.0


def test_memory_is_compared_with_that_of_a_peer_or_ceiling():
    target = Target("c", "s", "d", "extra_ratio", 1.05, PLAIN_STEP)
    found = {"hftcore": {"extra_bytes": 110, "times_ms": [1.0]}, PLAIN_STEP: {"extra_bytes": 100, "times_ms": [1.0]}}
    assert target.values(found.get) == [1.1]
    assert not target.is_met(1.1)
    assert target.values({"hftcore": found["hftcore"]}.get) == []


def test_a_share_must_be_reached_not_undercut():
    target = Target("c", "s", "d", "share", 50)
    assert target.is_met(60.0)
    assert not target.is_met(40.0)


def test_results_of_two_machines_make_no_ratio(tmp_path):
    file = written(tmp_path / "r.jsonl", line("prune_rows", "hftcore", "ours", [1.0]))
    other = FACTS | {"machine": FACTS["machine"] | {"cpu": "Another CPU"}}
    written(file, line("prune_rows", IN_PLACE, "ceiling", [1.0]), facts=other)
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.exit_code == 1
    assert "r.jsonl holds results of 2 machines; keep one file for each" in done.output


def test_older_files_are_read(tmp_path):
    file = written(tmp_path / "r.jsonl", line("prune_rows", "hftcore", "ours", [1.0]))
    old = json.loads(file.read_text())
    old["rows"], old["columns"] = old.pop("size")
    del old["products"], old["reason"]
    file.write_text(json.dumps(old) + "\n")
    assert results.load(file)[0]["size"] == [4096, 4096]
    assert "llama-7b.q_proj [4096, 4096]" in report(results.load(file), "r")


@given(st.floats(-2.0, 3.0), st.floats(0.01, 100.0))
def test_a_power_law_has_its_exponent_and_no_bend(power, factor):
    points = [(float(2**n), factor * 2.0 ** (n * power)) for n in range(1, 10)]
    assert exponent(points) == pytest.approx(power, abs=1e-6)
    assert bend(points) is None


def test_a_bend_is_found_where_it_is():
    steep = [(float(2**n), 2.0 ** (2 * n)) for n in range(6)]
    flat = [(float(2**n), 2.0 ** (n + 5)) for n in range(6, 12)]
    assert bend(steep + flat) == Bend(at=32.0, before=2.0, after=1.0)


def test_too_few_points_have_no_bend():
    assert bend([(1.0, 1.0), (2.0, 1.0), (4.0, 9.0)]) is None


def test_every_curve_runs_at_its_smallest_values():
    for name, sweep in SWEEPS.items():
        job = sweep.job(sweep.values[0], torch.float32, CPU)
        job.restore()
        assert job.ours() is not None, name
        assert list(sweep.values) == sorted(set(sweep.values))


def test_every_round_of_a_sweep_visits_every_value():
    ran = []

    def job(value, dtype, device):
        return Job(lambda: ran.append(value), {}, lambda: ran.append(-value), torch.equal)

    sweep = Sweep("", "", (1.0, 2.0, 3.0), job)
    times = scaling.sweep_times(sweep, torch.float32, CPU, 2, 9.0, timing.Canary(timing.Clock(CPU)))
    assert {value: len(found) for value, found in times.items()} == {1.0: 2, 2.0: 2, 3.0: 2}
    assert ran[3:] == [-1.0, 1.0, -2.0, 2.0, -3.0, 3.0, -3.0, 3.0, -2.0, 2.0, -1.0, 1.0]


def test_threads_are_as_before_after_the_curve_of_threads():
    usual = torch.get_num_threads()
    job = SWEEPS["prune_rows by threads"].job(1.0, torch.float32, CPU)
    job.ours()
    assert torch.get_num_threads() == usual


def test_the_inputs_of_the_curve_of_threads_are_restored_by_as_many(monkeypatch):
    """What changes their number starts or ends threads, which must not be timed."""
    counts = []
    usual = torch.get_num_threads()
    job = SWEEPS["prune_rows by threads"].job(1.0, torch.float32, CPU)
    monkeypatch.setattr(scaling.torch, "set_num_threads", counts.append)
    job.restore()
    assert counts == [1, usual]


def test_the_sizes_that_costs_are_shown_against_are_those_that_are_promised():
    axes = [curve.axis for curve in scaling.curves().values()]
    for size in ("rows", "columns", "tokens", "samples", "layers", "sparsity", "threads", "rank", "processes"):
        assert any(axis.startswith(size) for axis in axes), size


def test_a_model_of_the_curve_of_layers_has_so_many(monkeypatch):
    depths = []
    monkeypatch.setattr(
        scaling.hftcore, "calibrate", lambda model, batches: depths.append(len(model.model.layers)) or batches
    )
    for value in (1.0, 2.0):
        SWEEPS["calibrate by layers"].job(value, torch.float32, CPU).ours()
    assert depths == [1, 2]


def ranked(count, alone_s, shared_s):
    """What several processes found, who each have times of a second or so."""
    times = {"alone_s": alone_s, "shared_s": shared_s}
    return {
        "ranks": count,
        "calibration": times,
        "selection": [times | {"pattern": "0.5 row", "matrices": 64}],
        "neighbours": 0.0,
    }


def test_several_processes_become_curves_and_verdicts(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "r.jsonl"
    for found in (
        ranked(1, [2.0] * 6, [2.0] * 6),
        ranked(2, [2.0] * 6, [1.0] * 6),
        ranked(4, [2.0] * 6, [0.5] * 6),
    ):
        results.append(file, ranks.lines(found), FACTS)
    lines = results.load(file)
    text = report(lines, "r")
    assert "| calibrate by ranks 2 float32: at least 1.7 x faster than one process | 2 | 2 | met |" in text
    assert (
        "1074 M weights, by ranks 2 bfloat16: at most 1.05 x the time of each process by itself | 0.5 | 0.5 |" in text
    )
    assert "| calibrate, 16 x 128 tokens | processes of a thread | 2e+03 ms at 1 | 500 ms at 4 | -1.00 | – |" in text
    assert [title for title, _ in plots.draw(lines, tmp_path / "plots")] == [plots.TITLES["scaling"]]


def test_what_processes_found_is_added_to_no_file_of_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "measure", lambda *_, **__: pytest.fail("measured"))
    file = written(tmp_path / "r.jsonl", line("prune_rows", "hftcore", "ours", [1.0]))
    done = CliRunner().invoke(app, ["ranks", "--out", str(file)])
    assert done.exit_code == 1
    assert "holds results of another machine" in done.output


def test_a_shape_may_say_its_sizes():
    assert shape_of("3x5x7", torch.float32) == (3, 5, 7)


def everything(path):
    curve = [line("prune_rows by rows", "hftcore", "ours", [n / 8] * 3, shape=str(n)) for n in (8, 16, 32, 64)]
    return written(
        path,
        line("prune_rows", "hftcore", "ours", [2.0] * 3),
        line("prune_rows", IN_PLACE, "ceiling", [1.0] * 3),
        line("prune_rows", "Wanda-code sort", "peer", [200.0] * 3, extra=10**9),
        line("prune_rows", "torch.topk", "missing", []),
        *curve,
    )


def test_the_report_comes_with_its_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out" / "REPORT.md"
    out.parent.mkdir()
    done = CliRunner().invoke(app, ["report", str(everything(tmp_path / "r.jsonl")), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    for name, title in plots.TITLES.items():
        assert f"![{title}](plots/{name}.png)" in text
        picture = (out.parent / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    assert "| prune_rows [M, 4096] | rows M | 1 ms at 8 | 8 ms at 64 | 1.00 | – |" in text
    assert "| 50 % |" in text


def test_pictures_need_something_to_show(tmp_path):
    pytest.importorskip("matplotlib")
    lines = loaded(tmp_path, line("dispatch_prune", "hftcore", "ours", [1.0], shape="dispatch"))
    assert plots.draw(lines, tmp_path / "plots") == []


def test_the_curves_of_one_run_become_exponents(tmp_path, monkeypatch):
    curve = Sweep("a sleeping op", "naps", (1.0, 2.0, 4.0, 8.0), lambda *_: Job(list, {}, list, torch.equal))
    monkeypatch.setitem(SWEEPS, "nap", curve)
    done = CliRunner().invoke(app, ["scale", "--quick", "--curve", "nap", "--out", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 0, done.output
    assert "| a sleeping op | naps |" in done.output
    assert {one["shape"] for one in results.load(tmp_path / "r.jsonl")} == {"1", "2", "4", "8"}


def test_a_curve_nobody_knows_is_refused():
    done = CliRunner().invoke(app, ["scale", "--curve", "prune_row"])
    assert done.exit_code == 1
    assert "--curve must be one of prune_rows by columns," in done.output


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "folder", lambda: tmp_path / ".cache" / "peers")
    return tmp_path / ".cache" / "peers"


def test_a_package_that_is_not_there_says_how_to_get_it(cache):
    done = CliRunner().invoke(app, ["peers"])
    assert done.exit_code == 0
    assert "opacus: not installed; run hftcore-bench peers --install" in done.output
    assert "safetune: not compared: its licence" in done.output


def test_a_package_that_is_left_out_is_never_installed_and_stands_in_the_table_with_its_reason(cache, monkeypatch):
    installed = []
    monkeypatch.setattr(packages.venv, "create", lambda *_, **__: pytest.fail("made"))
    done = CliRunner().invoke(app, ["peers", "--install", "--name", "safetune"])
    assert done.exit_code == 1
    assert "error: safetune: not compared: its licence" in done.output
    monkeypatch.setattr(packages, "install", lambda name, say: installed.append(name))
    assert CliRunner().invoke(app, ["peers", "--install"]).exit_code == 0
    assert installed == list(packages.PACKAGES)
    job = CASES["antidote"].prepare("tiny-llama", torch.float32, CPU)
    assert job.missing == {"SafeTune's Antidote": packages.LEFT_OUT["safetune"]}
    assert "published way" in job.peers


@pytest.mark.parametrize(("shape", "sits_out"), [("smollm2-short", set()), ("smollm2", {"llm-compressor Wanda"})])
def test_packages_sit_out_where_no_second_copy_would_fit(cache, monkeypatch, shape, sits_out):
    monkeypatch.setattr(whole, "model_of", lambda *_: model_of("tiny-llama", torch.float32, CPU))
    monkeypatch.setattr(packages, "why_not", lambda name: None)
    job = CASES["wanda block by block"].prepare(shape, torch.float32, CPU)
    assert job.missing == dict.fromkeys({"published way"} | sits_out, whole.TOO_MUCH)
    assert set(job.peers) == {"llm-compressor Wanda"} - sits_out


def test_an_installation_that_fails_leaves_its_reason(cache, monkeypatch):
    monkeypatch.setattr(packages.venv, "create", lambda at, **_: (at / "lib/python3/site-packages").mkdir(parents=True))
    monkeypatch.setattr(packages, "python_of", lambda name: Path(sys.executable))
    monkeypatch.setitem(packages.PACKAGES, "opacus", packages.Package("no such package==1", "opacus"))
    done = CliRunner().invoke(app, ["peers", "--install", "--name", "opacus"])
    assert done.exit_code == 0, done.output
    assert "opacus: it could not be installed: " in done.output
    assert packages.why_not("opacus").startswith("it could not be installed: ")


def test_a_package_nobody_knows_is_refused(cache):
    done = CliRunner().invoke(app, ["peers", "--install", "--name", "opcaus"])
    assert done.exit_code == 1
    assert "a peer must be one of opacus, llmcompressor, got 'opcaus'" in done.output
