"""The scoreboard on a miniature: one tiny random model, two cells; and what is read out of boards made by hand."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import typer
from test_evaluate import word_tokenizer
from tiny_models import tiny_model
from typer.testing import CliRunner

from hftcore.bench import scoreboard as command
from hftcore.bindings.datasets import LabelledReply, Pair
from hftcore.bindings.evaluation import metrics, scoreboard, scoreboard_report
from hftcore.bindings.evaluation.scoreboard import DEFENCES, Cell, Data, Scoreboard, Setting, cells_of
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.evaluation.tasks import Task
from hftcore.bindings.models_io import load_model, save_model
from hftcore.errors import HftcoreError

SETTING = Setting((0.2,), (1,), (0,), size=10, batch_size=5, max_length=40)
SUITE = Suite({"HS": ["w3 w4", "w5"]}, [], {"FA": Task([Pair("w9", "w10")], "label")}, max_new_tokens=2)


def data():
    return Data(
        [f"w3 w{i}" for i in range(4, 10)],
        [Pair(f"w4 w{i}", "w5 w6") for i in range(4, 20)],
        [f"w5 w{i}" for i in range(4, 10)],
        [Pair(f"w6 w{i}", "w7") for i in range(4, 20)],
        [f"w7 w{i}" for i in range(4, 10)],
        [Pair(f"w8 w{i}", "w7") for i in range(4, 10)],
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(tiny_model("llama"), word_tokenizer(), folder)
    return str(folder)


def test_a_miniature_runs_writes_its_page_and_is_not_run_again(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command.datasets, "load", lambda name: [LabelledReply("a", "b", False)] * 2)
    rows = ["SFT", "Antidote 0.1"]
    trained = []
    plain = Scoreboard._train
    monkeypatch.setattr(Scoreboard, "_train", lambda self, *args: trained.append(args[0]) or plain(self, *args))
    board = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    sentences = command.run_board(board, rows, tmp_path / "scoreboard.md", "the command")
    assert trained == ["sft", "sft"], "both rows share alignment and fine-tuning"
    text = (tmp_path / "scoreboard.md").read_text()
    assert "`the command`" in text
    assert all(f"| {row} |" in text for row in rows)
    assert all(sentence in text for sentence in sentences)
    assert (tmp_path / "scoreboard.png").read_bytes().startswith(b"\x89PNG")
    assert "w3" not in (tmp_path / "out" / "scoreboard.json").read_text(), "no request is written down"
    again = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    monkeypatch.setattr(scoreboard, "load_model", lambda *args, **_: pytest.fail("a finished cell is loaded again"))
    assert command.run_board(again, rows, tmp_path / "scoreboard.md", "the command") == sentences
    assert len(json.loads((tmp_path / "out" / "scoreboard.json").read_text())["cells"]) == 4


def test_a_board_killed_in_the_middle_keeps_what_was_trained_and_measured(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    cells = [Cell(row, 0.2, 1, 0) for row in ("SFT", "Lisa", "Antidote 0.1")]
    plain, trained = Scoreboard._train, []

    def killed(self, method, *args):
        if method == "lisa" and len(trained) == 2:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(method)
        return plain(self, method, *args)

    monkeypatch.setattr(Scoreboard, "_train", killed)
    board = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        list(map(board.run, cells))
    done = json.loads((tmp_path / "out" / "scoreboard.json").read_text())["cells"]
    assert len(done) == 2, "the parts of SFT's cell"
    again = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    for cell in cells:
        again.run(cell)
    assert trained == ["sft", "sft", "killed", "lisa"]
    after = json.loads((tmp_path / "out" / "scoreboard.json").read_text())["cells"]
    assert len(after) == 6
    assert done.items() <= after.items()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_only_what_is_found_is_written_and_nothing_is_run(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command.datasets, "load", lambda name: [LabelledReply("a", "b", False)] * 2)
    docs = tmp_path / "scoreboard.md"
    board = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    with pytest.raises(HftcoreError, match="nothing of this grid is measured"):
        command.run_board(board, ["SFT"], docs, "the command", only_found=True)
    assert not docs.exists()
    board.run(Cell("SFT", 0.2, 1, 0))
    wider = Scoreboard(base, data(), SUITE, replace(SETTING, seeds=(0, 1)), tmp_path / "out")
    monkeypatch.setattr(Scoreboard, "_train", lambda *_: pytest.fail("a missing cell is trained"))
    command.run_board(wider, ["SFT", "Lisa"], docs, "the command", only_found=True)
    text = docs.read_text()
    assert "1 of 4 cells are measured" in text
    assert "(1 of 2 seeds) |" in text
    assert "| Lisa | – |" in text


def test_a_board_with_a_deadline_ends_there_and_writes_its_page(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "aligned_model", lambda out: base)
    monkeypatch.setattr(command, "default_data", data)
    monkeypatch.setattr(command, "suite_of", lambda limit, harmbench: SUITE)
    monkeypatch.setattr(command, "Setting", lambda bf16: SETTING)
    monkeypatch.setattr(command.datasets, "load", lambda name: [LabelledReply("a", "b", False)] * 2)
    times = iter((0, 0, 2))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(command, "DEFENCES", {name: DEFENCES[name] for name in ("SFT", "Antidote 0.1", "Lisa")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Track", lambda cells, _: cells)
        assert command.run_until(1, tmp_path) == 2
    assert "2 of 3 cells are measured" in (tmp_path / "scoreboard.md").read_text()


def test_a_smaller_alignment_and_bfloat16_reach_the_training(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    setting = replace(SETTING, align_size=2, lora_alpha=64, bf16=True)
    board = Scoreboard(base, data(), SUITE, setting, tmp_path / "out")
    trained, loaded = [], []
    plain, load = Scoreboard._datasets, scoreboard.load_model
    monkeypatch.setattr(Scoreboard, "_datasets", lambda self, *a: trained.append(plain(self, *a)) or trained[-1])
    monkeypatch.setattr(scoreboard, "load_model", lambda *a, **k: loaded.append(k["dtype"]) or load(*a, **k))
    items = board.run(Cell("Lisa", 0.2, 1, 0))
    assert [len(sets["train_dataset"]) for sets in trained] == [6, 10], "two refusals and four benign pairs; ten items"
    assert len(trained[1]["alignment_dataset"]) == 2
    assert loaded == ["float32", "float32", "bfloat16"], "both trainings, then the evaluation"
    assert board.found(Cell("Lisa", 0.2, 1, 0)) == items
    adapter = next((tmp_path / "out" / "models").glob("tuned-*/adapter_config.json"))
    assert json.loads(adapter.read_text())["lora_alpha"] == 64


def test_the_command_line_is_written_as_it_was_given(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command.embedded, "prepare", lambda: base)
    monkeypatch.setattr(command, "default_data", data)
    suites = {"quick": SUITE, "full": replace(SUITE, harmful=SUITE.harmful | {"HS_harmbench": ["w6", "w7"]})}
    monkeypatch.setattr(command, "load_suite", lambda name: replace(suites[name], benign=["w3"], documents=["w4"]))
    monkeypatch.setattr(command, "run_board", lambda *arguments: seen.append(arguments) or ["a sentence"])
    app = typer.Typer()
    app.command()(command.main)
    given = "--seeds 2 --poison 0,0.2 --strengths 1 --trained 0.2 --size 10 --align-size 4 --learning-rate 0.0005 "
    given += "--batch-size 2 --lora-alpha 8 --bf16 --limit 1 --harmbench --row Lisa"
    result = CliRunner().invoke(app, [*given.split(), "--row", "adapter × 0.2", "--out", str(tmp_path)])
    assert result.output == "a sentence\n"
    board, names, docs, line, only_found = seen[0]
    assert line == f"python -m hftcore.bench.scoreboard {given} --row 'adapter × 0.2' --out DIR"
    assert [part.recipe["part"] for part in board._parts] == ["HS", "HS_harmbench", "FA"]
    assert board.setting == Setting(
        (0.0, 0.2), (1,), (0, 1), (0.2,), 10, 4, learning_rate=5e-4, batch_size=2, lora_alpha=8, bf16=True
    )
    assert (names, docs.name, only_found) == (["SFT", "Lisa", "adapter × 0.2"], "scoreboard.md", False)
    refused = CliRunner().invoke(app, ["--out", str(tmp_path), "--base", base, "--aligned"])
    assert refused.exit_code == 2
    assert len(seen) == 1


def test_the_aligned_start_is_the_base_with_the_adapter_merged_and_made_once(base, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(parameter)
    save_model(model, word_tokenizer(), tmp_path / "adapters" / "aligned")
    monkeypatch.setattr(command, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(command.embedded, "prepare", lambda: base)
    folder = command.aligned_model(tmp_path / "out")
    found, wanted = load_model(folder)[0].state_dict(), model.merge_and_unload().state_dict()
    assert not (folder / "adapter_config.json").exists()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("made again"))
    assert command.aligned_model(tmp_path / "out") == folder


def test_every_row_has_a_trainer_and_a_dose_that_exist():
    for name, row in DEFENCES.items():
        assert {row.align, row.tune} <= set(scoreboard.METHODS), name
        assert row.post is None or row.post in scoreboard.DOSES, name
    assert sum(row.is_null for row in DEFENCES.values()) >= 3


@pytest.mark.parametrize("name", [name for name, row in DEFENCES.items() if (row.align, row.tune) != ("sft", "sft")])
def test_each_trainer_gets_the_data_it_takes(base, tmp_path, name):
    pytest.importorskip("peft")
    stage = DEFENCES[name].align if DEFENCES[name].align != "sft" else DEFENCES[name].tune
    board = Scoreboard(base, data(), SUITE, SETTING, tmp_path / "out")
    model, _ = board._train(stage, base, data().align_benign[:5], 2, 0, {})  # the first step only warms up
    assert any(".lora_B." in key and value.abs().sum() > 0 for key, value in model.named_parameters())


def test_the_grid_is_balanced_by_seed_and_a_poison_it_cannot_pay_for_is_refused(base, tmp_path):
    cells = cells_of(Setting((0.0, 0.1), (1,), (0, 1)), ["SFT", "Lisa"])
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4
    assert len(set(cells)) == 8
    few = cells_of(Setting((0.0, 0.1), (1,), (0,), trained_ratios=(0.1,)), ["SFT", "Lisa", "random 0.1"])
    assert [(cell.defence, cell.poison_ratio) for cell in few] == [
        ("SFT", 0.0),
        ("random 0.1", 0.0),
        ("SFT", 0.1),
        ("Lisa", 0.1),
        ("random 0.1", 0.1),
    ]
    with pytest.raises(HftcoreError, match="needs 20 harmful items, there are 6; lower size"):
        Scoreboard(base, data(), SUITE, Setting((0.2,), size=100), tmp_path)


def made(**rows):
    """A board of two poison ratios and two seeds; each row gives HS by ratio and FA, as counts of 20."""
    board = {}
    for name, (harm, task) in rows.items():
        for index, ratio in enumerate((0.0, 0.2)):
            for seed in (0, 1):
                items = {"HS": [float(i < harm[index]) for i in range(20)], "FA": [float(i < task) for i in range(20)]}
                board[Cell(NAMES.get(name, name), ratio, 1, seed)] = items | {"degenerate": [0.0] * 20}
    return board


NAMES = {"Antidote": "Antidote 0.1", "random": "random 0.1", "benign": "benign energies 0.1"}


def test_what_is_read_keeps_to_differences_beyond_the_noise():
    board = made(SFT=((2, 18), 16), Lisa=((2, 17), 16), Antidote=((2, 3), 6), random=((2, 18), 16), benign=((2, 3), 6))
    text = scoreboard_report.read(board)
    assert "HS of SFT by poison ratio is 10, 90 %, which rises as it should." in text[0]
    assert "Lisa: no HS that differs from SFT's beyond the noise." in text
    assert "Antidote 0.1: HS below SFT's at p 0.2 × 1 (-75); FA below SFT's at p 0 × 1 (-50), p 0.2 × 1 (-50)." in text
    assert "Antidote 0.1 against the null hypothesis random 0.1: HS lower in 1 and higher in 0 of 2 attacks." in text
    assert "Antidote 0.1 against the null hypothesis benign energies 0.1: no difference shown." in text


def test_harm_above_that_of_plain_fine_tuning_is_said_too():
    text = scoreboard_report.read(made(SFT=((2, 2), 6), Lisa=((2, 19), 16)))
    assert "Lisa: HS above SFT's at p 0.2 × 1 (+85); FA above SFT's at p 0 × 1 (+50), p 0.2 × 1 (+50)." in text
    assert "4 differences from SFT were looked at" in text[-1]


def test_a_row_of_noise_is_called_broken():
    board = made(SFT=((2, 18), 16), random=((0, 0), 16))
    for cell in board:
        if cell == Cell("random 0.1", 0.2, 1, cell.seed):
            board[cell]["degenerate"] = [1.0] * 10 + [0.0] * 10
    found = [sentence for sentence in scoreboard_report.read(board) if "broken" in sentence]
    assert found == ["random 0.1 is broken at p 0.2 × 1 (50 %): that many replies are noise, so HS says nothing there."]


def test_an_attack_that_does_not_hurt_is_called_unfit():
    assert "not fit to compare defences" in scoreboard_report.read(made(SFT=((2, 2), 16)))[0]


def test_the_page_marks_null_hypotheses_and_leaves_gaps_for_what_was_not_run():
    board = made(SFT=((2, 18), 16), random=((2, 18), 16))
    board.pop(Cell("random 0.1", 0.2, 1, 0))
    board.pop(Cell("random 0.1", 0.2, 1, 1))
    board.pop(Cell("SFT", 0.2, 1, 1))
    about = {"base": "m", "setting": asdict(Setting((0.0, 0.2), (1,), (0, 1), align_size=7))}
    judged = {"replies": 2, "accuracy": 1.0, "files": []}
    text = scoreboard_report.page(
        board, cells_of(Setting((0.0, 0.2), (1,), (0, 1)), ["SFT", "random 0.1"]), "cmd", about, judged
    )
    assert "| *random 0.1* (null) | HS 10 [0, 25], FA 80 [60, 95] | – |" in text
    assert "FA 80 [60, 95] (1 of 2 seeds) |" in text
    assert "near-duplicates of those that alignment and attack use; no others were asked." in text
    assert "5 of 8 cells are measured" in text
    assert "7 harmful requests with refusals" in text


def test_runs_that_differ_widen_the_interval():
    alike = metrics.bootstrap_runs([[1.0, 0.0] * 10] * 3)
    apart = metrics.bootstrap_runs([[1.0] * 20, [0.0] * 20, [1.0, 0.0] * 10])
    assert alike.value == apart.value == 0.5
    assert apart.high - apart.low > 1.3 * (alike.high - alike.low)
    with pytest.raises(HftcoreError, match="the same items"):
        metrics.bootstrap_runs([[1.0], [1.0, 0.0]])


def test_harmbench_stands_beside_hs_where_it_was_asked():
    board = made(SFT=((2, 18), 16), Lisa=((2, 2), 16))
    for cell, items in board.items():
        items["HS_harmbench"] = [
            float(i < (5 if cell.defence == "SFT" and cell.poison_ratio else 0)) for i in range(10)
        ]
    about = {"base": "m", "setting": asdict(Setting((0.0, 0.2), (1,), (0, 1), align_size=7))}
    judged = {"replies": 2, "accuracy": 1.0, "files": []}
    text = scoreboard_report.page(board, list(board), "cmd", about, judged)
    assert "HS 90 [75, 100], HB 50 [" in text
    assert "HB: the share served of 10 requests of HarmBench" in text
    assert any("HB below SFT's at p 0.2 × 1 (-50)" in line for line in scoreboard_report.read(board))


def test_no_two_rows_of_the_board_look_alike():
    looks = scoreboard_report._looks(list(DEFENCES))
    assert len({(look["fmt"], look["color"]) for look in looks.values()}) == len(DEFENCES)
